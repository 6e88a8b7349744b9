"""A process that has imported everything and forks a child for each request, so that a run starts in no time.

Requests are lines of JSON on stdin: {"call": "module:function", "args": [...], "env": {...}, "log": PATH} is answered
by the child's pid, {"wait": PID} by its exit code (negative: the signal that ended it).
"""

import importlib
import json
import os
import sys
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))


def child(request: dict) -> int:
    os.environ.update(request["env"])
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    module, function = request["call"].split(":")
    try:
        return getattr(importlib.import_module(module), function)(*request["args"]) or 0
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def main() -> None:
    import psutil  # noqa: F401
    import tokenizers  # noqa: F401
    import torch
    import torch._dynamo  # torch.distributed.fsdp imports it, slowly
    import torch.distributed.checkpoint
    import torch.distributed.fsdp

    import nemo_lite.check
    import nemo_lite.train.__main__
    import nemo_lite.train.loop
    import nemo_lite.train.report  # noqa: F401
    from nemo_lite.config import load_recipe

    load_recipe(Path(__file__).parent / "recipes" / "resume.yaml")  # imports what reads recipes
    for module in sys.argv[1:]:
        importlib.import_module(module)
    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w")
    print(json.dumps("ready"), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            _, status = os.waitpid(request["wait"], 0)
            answer = os.waitstatus_to_exitcode(status)
        else:
            sys.stdout.flush()
            answer = os.fork()
            if answer == 0:
                os._exit(child(request))
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
