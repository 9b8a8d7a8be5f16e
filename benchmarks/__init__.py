"""Programs that measure."""

import conch as conch  # before torch: how OpenMP's threads wait is set as it is imported
