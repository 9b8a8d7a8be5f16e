"""`conch-to-triton`, for those who look for it here:

python to_triton.py --checkpoint lvwerra/distilbert-imdb --name distilbert-imdb
"""

from __future__ import annotations

import sys

from conch.converters.to_triton import main

if __name__ == "__main__":
    sys.exit(main())
