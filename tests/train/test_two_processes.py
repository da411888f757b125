"""Two processes with one device each train what one process trains."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import optax

from lqec_jax.core.types import Schedule
from lqec_jax.train.fit import Fitted, fit
from lqec_jax.train.sharding import make_mesh, shard_params
from tests.compiling import TURNED_OFF
from tests.train.tiny import adapters, make_plain_problem

ROOT = Path(__file__).parents[2]
TIMEOUT = 120


def train(mesh=None) -> Fitted:
    """Does three updates of RILQ."""
    problem = make_plain_problem(length=8, d=64)
    schedule = Schedule(updates=3, batch=2, eval_every=1)
    fitted = fit(problem.fns, problem.params, problem.objective(val=2), optax.adam(1e-2),
                 schedule, jax.random.key(0), mesh=mesh)  # fmt: skip
    if mesh is None:
        return fitted
    # A next step may begin with arrays that no process holds whole.
    params = fitted.params
    for other in (make_mesh(model=2), mesh):
        params, notes = shard_params(problem.fns, params, other)
        assert not notes
    return fitted._replace(params=params)


def summarize(fitted: Fitted) -> dict:
    return {
        "losses": [[point.train_loss or 0.0, point.val_loss] for point in fitted.history],
        "adapters": [float(np.abs(array).sum()) for array in adapters(fitted.params)],
    }


def work(number: int, port: int) -> None:
    """What each of the two processes runs."""
    jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=number)
    assert jax.device_count() == 2 and jax.local_device_count() == 1
    print(json.dumps(summarize(train(make_mesh(data=2)))))
    jax.distributed.shutdown()


def find_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start(number: int, port: int) -> subprocess.Popen:
    kept = {name: value for name, value in os.environ.items()
            if not name.lower().endswith("_proxy") and name != "XLA_FLAGS"}  # fmt: skip
    if TURNED_OFF in os.environ.get("XLA_FLAGS", ""):
        kept["XLA_FLAGS"] = TURNED_OFF
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    environment = kept | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1", "PYTHONPATH": path}
    return subprocess.Popen(
        [sys.executable, __file__, str(number), str(port)],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_two_processes_give_the_result_of_one():
    port = find_port()
    workers = [start(number, port) for number in range(2)]
    try:
        outputs = [worker.communicate(timeout=TIMEOUT) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    for worker, (_, errors) in zip(workers, outputs, strict=True):
        assert worker.returncode == 0, errors[-2000:]
    first, second = (json.loads(output.splitlines()[-1]) for output, _ in outputs)
    assert first == second
    wanted = summarize(train())
    np.testing.assert_allclose(first["losses"], wanted["losses"], atol=1e-5)
    np.testing.assert_allclose(first["adapters"], wanted["adapters"], rtol=1e-5)
    assert wanted["losses"][-1][1] < wanted["losses"][0][1]


if __name__ == "__main__":
    work(int(sys.argv[1]), int(sys.argv[2]))
