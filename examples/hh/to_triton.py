"""`conch-to-triton`, for those who look for it here:

python to_triton.py --base_model EleutherAI/gpt-j-6B --checkpoint Dahoas/gptj-rm-static --revision 676bfd4d
"""

from __future__ import annotations

import sys

from conch.converters.to_triton import main

if __name__ == "__main__":
    sys.exit(main())
