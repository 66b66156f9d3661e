"""``python -m da_triton.check``: see ``da_triton.check``, the function, which this module leaves in
place where it is imported."""

import sys

from .selfcheck import check, main

if __name__ == "__main__":
    sys.exit(main())
sys.modules[__name__] = check  # type: ignore[assignment]
