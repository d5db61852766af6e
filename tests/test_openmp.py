"""Beside the OpenMP that another library brings along: imported first or last, threads in both, no bit changes.

Wheels have a libgomp each, so that two of them, or PyTorch's, are in one process.
"""

import pytest

PROGRAM = """
import numpy as np

def ours():
    import fastbn
    x = np.random.default_rng(0).standard_normal((4000, 200)).astype("float32")
    found = []
    for n in (1, 2, 3):
        with fastbn.threads(n):
            bn = fastbn.BatchNorm(200, activation="relu")
            found.append(bn(x).tobytes() + bn.backward(x).tobytes() + bn.running_var.tobytes())
    assert found[0] == found[1] == found[2]
    return found[0]

def sklearn():
    from sklearn.ensemble import HistGradientBoostingRegressor
    from threadpoolctl import threadpool_limits
    x = np.random.default_rng(1).standard_normal((3000, 8))
    with threadpool_limits(2):
        return HistGradientBoostingRegressor(max_iter=3, random_state=0).fit(x, x[:, 0]).predict(x).tobytes()

def torch():
    import torch
    torch.set_num_threads(2)
    x = torch.from_numpy(np.random.default_rng(2).standard_normal((4000, 200)).astype("float32"))
    return torch.nn.functional.batch_norm(x, None, None, training=True).numpy().tobytes()

calls = [{first}, {then}]
expected = [call() for call in calls]
for _ in range(3):
    assert [call() for call in calls] == expected
print("same")
"""


@pytest.mark.long
@pytest.mark.parametrize("other", ["sklearn", "torch"])
@pytest.mark.parametrize("first", ["ours", "theirs"])
def test_beside_another_openmp(python, other, first):
    pytest.importorskip(other)
    pair = ("ours", other) if first == "ours" else (other, "ours")
    done = python("-c", PROGRAM.replace("{first}", pair[0]).replace("{then}", pair[1]))
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["same"]
