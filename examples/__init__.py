"""Programs that show what Conch does."""

import conch as conch  # before torch: how OpenMP's threads wait is set as it is imported
