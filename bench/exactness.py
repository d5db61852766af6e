"""How exact each library is, on the same numbers: python -m bench.exactness

Writes docs/exactness.md. Digits of mean and standard deviation are those that agree with exact arithmetic on the stored
numbers; errors of outputs are in units of rounding of their size, as the numerics contract counts them.
"""

import argparse
import math
from collections.abc import Callable, Mapping
from fractions import Fraction
from importlib.metadata import version
from pathlib import Path

import numpy as np

from bench import nist

PAGE = Path(__file__).parents[1] / "docs" / "exactness.md"
EPS = 1e-5
Statistics = Callable[[np.ndarray], tuple[float, float]]  # mean and variance of 1/m, of numbers
Layer = Callable[[np.ndarray], np.ndarray]  # (M, C) normalised by its own statistics

# --- libraries


def of_fastbn(x: np.ndarray) -> tuple[float, float]:
    import fastbn

    stats = fastbn.moments(x[:, None])
    return float(stats.mean[0]), float(stats.var[0])


def of_numpy(x: np.ndarray) -> tuple[float, float]:
    return float(x.mean()), float(x.var())


def of_torch(x: np.ndarray) -> tuple[float, float]:
    import torch

    var, mean = torch.var_mean(torch.from_numpy(x), correction=0)
    return float(mean), float(var)


def of_jax(x: np.ndarray) -> tuple[float, float]:
    import jax

    jax.config.update("jax_enable_x64", True)
    return float(jax.numpy.mean(x)), float(jax.numpy.var(x))


def of_sklearn(x: np.ndarray) -> tuple[float, float]:
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(x[:, None])
    return float(scaler.mean_[0]), float(scaler.var_[0])


def layer_of_fastbn(x: np.ndarray) -> np.ndarray:
    import fastbn

    return fastbn.batch_norm_forward(x, eps=EPS)[0]


def layer_of_numpy(x: np.ndarray) -> np.ndarray:
    return np.asarray((x - x.mean(0)) / np.sqrt(x.var(0) + np.asarray(EPS, x.dtype)))


def layer_of_torch(x: np.ndarray) -> np.ndarray:
    import torch

    t = torch.from_numpy(x)
    return np.asarray(torch.nn.functional.batch_norm(t, None, None, training=True, eps=EPS).numpy())


def layer_of_jax(x: np.ndarray) -> np.ndarray:
    import jax

    jax.config.update("jax_enable_x64", True)
    return np.asarray(jax.nn.standardize(x, axis=0, epsilon=np.asarray(EPS, x.dtype)))


def layer_of_sklearn(x: np.ndarray) -> np.ndarray:
    from sklearn.preprocessing import StandardScaler

    return np.asarray(StandardScaler().fit_transform(x))


LIBRARIES: Mapping[str, tuple[str, Statistics, Layer]] = {
    "fastbn": ("fastbn", of_fastbn, layer_of_fastbn),
    "NumPy": ("numpy", of_numpy, layer_of_numpy),
    "PyTorch": ("torch", of_torch, layer_of_torch),
    "JAX": ("jax", of_jax, layer_of_jax),
    "scikit-learn": ("scikit-learn", of_sklearn, layer_of_sklearn),
}

# --- exact arithmetic


def exact_statistics(x: np.ndarray) -> tuple[Fraction, Fraction]:
    numbers = [Fraction(v) for v in x.tolist()]
    mean = sum(numbers, Fraction()) / len(numbers)
    return mean, sum(((v - mean) ** 2 for v in numbers), Fraction()) / len(numbers)


def root(v: Fraction) -> Fraction:
    """To 60 digits and more."""
    shift = max(0, 512 - (v.numerator * v.denominator).bit_length())
    return Fraction(math.isqrt(v.numerator * v.denominator << 2 * shift), v.denominator << shift)


def digits(found: float, exact: Fraction) -> float:
    """Decimal digits that are right, at most those of float64 (the log relative error of NIST's tables)."""
    if not math.isfinite(found):
        return 0.0
    error = abs(Fraction(found) - exact) / abs(exact)
    return min(15.95, max(0.0, -math.log10(max(error, Fraction(1, 10**20)))))


def worst_error(y: np.ndarray, x: np.ndarray, eps: float = EPS) -> float:
    """The largest error of y = (x - mean)/sqrt(var + eps), in u*(1 + |y|), u = 2**-24 or 2**-53. (M, C)."""
    u = Fraction(1, 2**24 if x.dtype == np.float32 else 2**53)
    largest = Fraction()
    for c in range(x.shape[1]):
        mean, var = exact_statistics(x[:, c])
        scale = 1 / root(var + Fraction(eps))
        for v, given in zip(x[:, c].tolist(), y[:, c].tolist(), strict=True):
            if not math.isfinite(given):
                return math.inf
            exact = (Fraction(v) - mean) * scale
            largest = max(largest, abs(Fraction(given) - exact) / (u * (1 + abs(exact))))
    return float(largest)


# --- data


def batches(dtype: str) -> dict[str, np.ndarray]:
    """Eight features of 256 values each, of kinds that people have."""
    rng = np.random.default_rng(0)
    z = rng.standard_normal((256, 8))
    far = 10.0 ** np.arange(8) if dtype == "float64" else 10.0 ** (np.arange(8) / 2)
    outlier, clusters = z.copy(), np.where(z > 0, 1.0, 0.0) + 1e-4 * rng.standard_normal(z.shape)
    outlier[0] = 1e4
    kinds = {
        "standard normal": z,
        "mean/std 1e3": z + 1e3,
        "mean/std 1e6" if dtype == "float64" else "mean/std 1e5": z + (1e6 if dtype == "float64" else 1e5),
        "mean/std from 1 upwards": z + far,
        "an outlier in the first row": outlier,
        "two clusters": clusters + 1e3,
        "skewed": np.exp(3 * z),
        "sorted": np.sort(z, 0) + 100,
    }
    return {name: x.astype(dtype) for name, x in kinds.items()}


# --- the page


def cell(value: float, form: str) -> str:
    return "not finite" if math.isinf(value) else format(value, form)


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    lines = [f"| {' | '.join(head)} |", "|---" + "|--:" * (len(head) - 1) + "|"]
    return lines + [f"| {' | '.join(row)} |" for row in rows] + [""]


def of_nist() -> list[str]:
    rows = []
    for name, data in nist.DATA_SETS.items():
        x = np.array(data.values)
        mean, var = exact_statistics(x)
        cells = []
        for _, statistics, _ in LIBRARIES.values():
            got_mean, got_var = statistics(x)
            std = math.sqrt(got_var) if got_var >= 0 else math.nan
            cells.append(f"{digits(got_mean, mean):.1f}, {digits(std, root(var)):.1f}")
        rows.append([f"{name} ({len(x)})", *cells])
    return table(["data set (numbers)", *LIBRARIES], rows)


def of_outputs(dtype: str) -> list[str]:
    rows = []
    for name, x in batches(dtype).items():
        cells = []
        for _, _, layer in LIBRARIES.values():
            eps = 0.0 if layer is layer_of_sklearn else EPS
            cells.append(cell(worst_error(layer(x), x, eps), ".3g"))
        rows.append([name, *cells])
    return table([f"{dtype}: 256 values of 8 features", *LIBRARIES], rows)


def page() -> str:
    versions = ", ".join(f"{name} {version(package)}" for name, (package, _, _) in LIBRARIES.items())
    return "\n".join([
        "# How exact the libraries are",
        "",
        f"Written by `python -m bench.exactness`, with {versions}.",
        "",
        "## Digits of mean and standard deviation",
        "",
        "NIST's univariate data sets (Statistical Reference Datasets), in float64. Each cell has the right decimal",
        "digits of the mean and of the standard deviation, against exact arithmetic on the stored numbers. float64",
        "holds 15.95. NIST's own certified values are of the decimal numbers, which float64 cannot store;",
        "`tests/test_nist.py` compares with those.",
        "",
        "fastbn is `moments`, NumPy `x.mean(), x.var()`, PyTorch `torch.var_mean`, JAX `jnp.mean, jnp.var`,",
        "scikit-learn `StandardScaler`.",
        "",
        *of_nist(),
        "## Errors of a normalised batch",
        "",
        "The largest error of y = (x - mean)/sqrt(var + eps) over a batch, in units of u (1 + |y|): u is 2^-24 in",
        "float32, 2^-53 in float64. 1 is about what the last rounding alone costs; fastbn promises 5. eps is 1e-5, and",
        "0 for scikit-learn's StandardScaler, which has none.",
        "",
        "fastbn is `batch_norm_forward`, NumPy `(x - x.mean(0))/np.sqrt(x.var(0) + eps)`, PyTorch `F.batch_norm`, JAX",
        "`jax.nn.standardize`, scikit-learn `StandardScaler().fit_transform`.",
        "",
        *of_outputs("float32"),
        *of_outputs("float64"),
    ])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=PAGE, metavar="FILE")
    args = parser.parse_args()
    text = page()
    args.output.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
