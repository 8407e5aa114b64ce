"""What starts in the pod. transport.pod_program puts PARTS in front, (name, source) of the modules that the job needs:
they are made here, under their file names, so that a traceback names file and line as in the repository."""

import os
import sys
from types import ModuleType

for name, source in globals().get("PARTS", ()):
    module = sys.modules[name] = ModuleType(name)
    module.__path__ = []  # one that has not come is looked for nowhere else
    exec(compile(source, name.replace(".", "/") + ".py", "exec"), module.__dict__)

sys.modules["pod"].__dict__.setdefault("SOURCE", globals().get("SOURCE"))

if __name__ == "__main__":
    from pod.entry import main
    os._exit(main())  # not sys.exit: a thread that still waits for output must not hold the pod
