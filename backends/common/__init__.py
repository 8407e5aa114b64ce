"""What several executors share, one subject a file. Nothing here imports an executor."""

from types import ModuleType

import screen


def import_nemo() -> ModuleType:
    """nemo.py of this folder, whose import takes two seconds: what can be refused should have been by then."""
    with screen.step("import nemo_run"):
        from backends.common import nemo
    return nemo
