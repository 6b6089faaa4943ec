"""What test files share."""

import sys

if "pytest" in sys.modules:  # programs that tests start have no use for it
    sys.modules["pytest"].register_assert_rewrite(
        *(f"{__name__}.{name}" for name in ("cases", "jobs", "simulator", "stand_in"))
    )
