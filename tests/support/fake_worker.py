"""What a revision's bench/worker.py is to the runner, with no torch in it: the protocol, and times made up.

SLOWNESS, in its own package, is how long a call takes. Each row asked for is a line in the file that FAKE_LOG names.
"""

import json
import os
import sys
import threading
from pathlib import Path

from mlakit import SLOWNESS


def main() -> None:
    for line in sys.stdin:
        request = json.loads(line)
        if request["command"] == "probe":
            ceilings = {"device": "a CPU", "dtype": "float32", "copy_bytes_per_s": 1e9, "read_bytes_per_s": 1e9,
                        "flops_per_s": 1e9}  # fmt: skip
            environment = {"device": {"name": "a CPU"}, "slowness": SLOWNESS}
            answer = {"device": "cpu", "environment": environment, "ceilings": {"fp32": ceilings}}
        else:
            answer = {"row": row(request["config"])}
        print(json.dumps({"event": "stage", "name": "timing"}), flush=True)
        print(json.dumps({"event": "done", **answer}), flush=True)


def row(config: dict) -> dict:
    with open(os.environ["FAKE_LOG"], "a") as log:
        log.write(json.dumps({"side": SLOWNESS, **config}) + "\n")
    asked = Path(os.environ["FAKE_LOG"]).read_text().count("\n")
    if config["batch_spec"] == "q65":
        threading.Event().wait()
    if config["batch_spec"] == "q13" and SLOWNESS > 1:
        return {"config": config, "status": "crashed", "error": "an unlucky number"}
    drift = 1 + asked / 10  # the machine gets slower and slower
    samples = [1e-4 * SLOWNESS * drift * (1 + i / 1000) for i in range(config["repeats"])]
    ordered = sorted(samples)
    timing = {name: ordered[len(ordered) // 2] for name in ("median", "mean", "min", "max", "p20", "p80")}
    timing |= {"std": 0.0, "ci95": [ordered[0], ordered[-1]], "samples": samples}
    return {"config": config, "status": "ok", "timing": timing, "of_an_earlier_schema": 1}


if __name__ == "__main__":
    main()
