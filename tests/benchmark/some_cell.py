"""A cell that does what it is told and imports nothing heavy: `python -m tests.benchmark.some_cell FOLDER`."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path


def main(folder: Path) -> None:
    rank = int(os.environ.get("RANK", "0"))
    spec = json.loads((folder / "spec.json").read_text())
    match spec["do"][rank]:
        case dict(found):
            (folder / f"rank-{rank:04}.json").write_text(json.dumps(found))
            sys.exit(0 if found["status"] == "ok" else 1)
        case "raise":
            raise RuntimeError("what a shame")
        case "leave":
            sys.exit(spec["code"])
        case "signal":
            print("the last words", flush=True)
            os.kill(os.getpid(), spec["signal"])
        case "pause":
            time.sleep(600)
        case "wait":
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            helper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
            Path(spec["pids"]).write_text(json.dumps([os.getpid(), helper.pid]))
            time.sleep(600)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
