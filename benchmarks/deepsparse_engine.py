"""DeepSparse 1.8 on a masked model, in a process of its own: its last release needs older packages than ours.

``python3.11 -m venv deepsparse && deepsparse/bin/pip install deepsparse==1.8.0``, then give ``deepsparse/bin/python``.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from pathlib import Path

import numpy as np
from torch import Tensor, nn

from autoprune.errors import AutopruneError
from autoprune.latency.engines.export import onnx_file
from benchmarks.engine_report import Spread, spread

IR_VERSION, OPSET = 9, 18  # the newest that it reads
ENVIRONMENT = {**os.environ, "NM_DISABLE_ANALYTICS": "True"}
SCRIPT = """
import json, sys, time
import numpy as np
from deepsparse import compile_model
folder, threads, samples = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
x = np.load(folder + "/x.npy")
engine = compile_model(folder + "/model.onnx", batch_size=x.shape[0], num_cores=threads)
for _ in range(5):
    engine.run([x])
taken = []
for _ in range(samples):
    start = time.perf_counter()
    engine.run([x])
    taken.append(1e3 * (time.perf_counter() - start))
print(json.dumps(taken))
"""


class DeepSparse:
    """Times models with the DeepSparse that `python` can import.

    Raises:
        AutopruneError: it cannot.
    """

    def __init__(self, python: str) -> None:
        self.python = python
        self._run("import deepsparse")

    def measure(self, model: nn.Module, x: Tensor, threads: int, samples: int) -> Spread:
        """Milliseconds an inference of `model` on `x`.

        Raises:
            AutopruneError: it cannot run the model.
        """
        import onnx

        with onnx_file(model, (x,), OPSET) as exported, tempfile.TemporaryDirectory(prefix="autoprune-") as folder:
            graph = onnx.load(exported)
            graph.ir_version = min(graph.ir_version, IR_VERSION)
            onnx.save(graph, Path(folder) / "model.onnx")
            np.save(Path(folder) / "x.npy", x.numpy())
            said = self._run(SCRIPT, folder, str(threads), str(samples))
        return spread(json.loads(said.splitlines()[-1]))

    def _run(self, script: str, *arguments: str) -> str:
        command = [self.python, "-c", script, *arguments]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, env=ENVIRONMENT)
        except OSError as error:
            raise AutopruneError(f"DeepSparse: {self.python} cannot be started ({error}).") from None
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
            raise AutopruneError(f"DeepSparse, run by {self.python}, failed: {last}")
        return done.stdout
