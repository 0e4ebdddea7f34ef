"""Runs in a process in which calls can be made to fail: started by ``test_disk``, never imported.

    LD_PRELOAD=failing_calls.so python -m tests.failing_runs FOLDER CALL:FILE:ERRNO ...

For each fault one run that meets it, and one after it that does not; a JSON line about each.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from tests.sessions import half_written, leftovers
from vaeq.config import DataConfig, GenerationConfig, MeasureConfig, RunConfig
from vaeq.errors import DiskError
from vaeq.experiment import run
from vaeq.launch.progress import Event
from vaeq.runs.record import complete_record, run_directory


def tiny(outputs: Path) -> RunConfig:
    """A run of a fraction of a second."""
    return RunConfig(
        encoder_depth=1,
        encoder_width=8,
        decoder_depth=1,
        decoder_width=8,
        epochs=2,
        outputs=str(outputs),
        device="cpu",
        data=DataConfig(n_train=200, n_test=100),
        measure=MeasureConfig(panel="decomposition", n_samples=100),
        generation=GenerationConfig(n_importance=None, quality=False),
    )


def main(folder: Path, faults: list[str]) -> None:
    undisturbed = run(tiny(folder / "undisturbed"), lambda event: None, threads=1).estimates
    for number, fault in enumerate(faults):
        config = tiny(folder / str(number))
        directory = run_directory(config)
        call, file, error = fault.split(":")
        os.environ.update(FAIL_CALL=call, FAIL_FILE=file, FAIL_ERRNO=error)
        events: list[Event] = []
        sentence = ""
        try:
            run(config, events.append, threads=1)
        except DiskError as raised:
            sentence = str(raised)
        del os.environ["FAIL_CALL"]
        told = {
            "fault": fault,
            "sentence": sentence,
            "notes": [event.message for event in events if event.kind == "note"],
            "complete": complete_record(directory, config) is not None,
            "half_written": half_written(folder),
            "leftovers": leftovers([folder]),
        }
        again = run(config, lambda event: None, threads=1)
        told["healed"] = again.state == "complete" and again.estimates == undisturbed
        print(json.dumps(told))  # noqa: T201


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
