"""Where the constants of the activation codes come from: the best h~ for GELU and SiLU, 1 to 4 bits.

    python3 dev/bench/fit_codes.py                                  all functions, 1 to 4 bits
    python3 dev/bench/fit_codes.py --function gelu-tanh --bits 2 4 --plot build/codes.png

The backward pass of an activation h uses the derivative of
    h~(x) = sum_i a_i max(x - c_i, 0),  i = 1 .. 2^k - 1,  sum a_i = 1,  sum a_i c_i = 0,
a step function of 2^k levels, so k bits say which level an x has. The two constraints say that h~ -> 0 to the left and h~ -> x
to the right. (a, c) minimise the integral of (h - h~)^2 over the line (Yang et al., ICML 2024, arXiv 2406.16282). Nothing else
goes in: 2 bits come out beside the published constants, and prepro/codes.py's other tables are what this prints, but for
rounding in the last digits. 1 bit has nothing to fit: a = 1, c = 0, which is ReLU.

For 2 bits it also prints the step function that is closest to h' itself, under N(0,1) (make APPROX_FIT=slope). Its integral is no h~.

Needs SciPy, and for --plot Matplotlib: apt-get install python3-scipy python3-matplotlib.
"""
import argparse
import math
import os

import numpy as np

try:
    from scipy import optimize, special
except ImportError:
    raise SystemExit("fit_codes.py needs SciPy: apt-get install python3-scipy, or pip install scipy in a venv") from None

from common import pyplot, save

from codes import CODES

# ---- the activations, each with its derivative -----------------------------------------------------

def gelu_tanh(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

def gelu_tanh_slope(x):
    t = np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))
    return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * x * x)

def silu(x):
    return x * special.expit(x)

def silu_slope(x):
    s = special.expit(x)
    return s + x * s * (1 - s)

FUNCTIONS = {"gelu-tanh": (gelu_tanh, gelu_tanh_slope), "silu": (silu, silu_slope)}

# ---- integrals: Gauss-Legendre with 16 nodes on panels of at most half a unit. That is exact to double precision for these functions ----
# wherever they are smooth, so a panel must not contain a kink.

NODES, WEIGHTS = np.polynomial.legendre.leggauss(16)
FAR = 60.0  # beyond it |h - max(x, 0)| is below 1e-24 for both

def integral(f, lo, hi):
    edges = np.linspace(lo, hi, max(1, math.ceil(2 * (hi - lo))) + 1)
    half = np.diff(edges)[:, None] / 2
    return float((half * WEIGHTS * f(edges[:-1, None] + half + half * NODES)).sum())

def slope_error(slope, c, slopes):
    """Relative squared error of h~' against h', x ~ N(0,1)."""
    edges = np.concatenate([[-13.0], c, [13.0]])
    pieces = [integral(lambda x: (slope(x) - s)**2 * np.exp(-0.5 * x * x), lo, hi) for s, lo, hi in zip(slopes, edges, edges[1:])]
    return sum(pieces) / integral(lambda x: slope(x)**2 * np.exp(-0.5 * x * x), -13, 13)

# ---- the fit ---------------------------------------------------------------------------------------

class Problem:
    """The objective as a function of c alone, a eliminated, with an exact gradient.

    Let r(x) = h(x) - max(x, 0) and give max(x, 0) itself the weight -1: with points p = (0, c) and weights b = (-1, a),
    h~ - max(x, 0) = sum b_i max(x - p_i, 0). The constraints are sum b_i = 0 and sum b_i p_i = 0, so this is zero beyond the
    outermost point on either side, and
        objective = int r^2 - 2 sum_i b_i M(p_i) + sum_ij b_i b_j |p_i - p_j|^3 / 12,
    M(p) = int_p^inf (x - p) r(x) dx, M' = -int_p^inf r; |x|^3/12 is the function whose fourth derivative is a unit impulse.
    Quadratic in a, so a linear system gives a for each c.
    """
    def __init__(self, h):
        self.h = h
        self.square = integral(lambda x: h(x)**2, -FAR, 0) + integral(lambda x: (h(x) - x)**2, 0, FAR)
        self.m0 = integral(lambda x: h(x) - x, 0, FAR)
        self.m1 = integral(lambda x: x * (h(x) - x), 0, FAR)
        panels = 32  # between 0, where r has its kink, and p
        self.u = ((np.arange(panels)[:, None] + 0.5 + 0.5 * NODES) / panels).ravel()
        self.w = np.tile(WEIGHTS / (2 * panels), panels)

    def moments(self, p):
        """M and M' at each p."""
        x = p[:, None] * self.u
        r = self.h(x) - np.maximum(x, 0)
        return self.m1 - p * self.m0 - p * ((r * (x - p[:, None])) @ self.w), -self.m0 + p * (r @ self.w)

    def solve(self, c):
        """The best a for these thresholds. Returns the objective, its gradient in c, and a."""
        n, p = len(c), np.concatenate([[0], c])
        M, dM = self.moments(p)
        d = p[:, None] - p
        K, dK = np.abs(d)**3 / 12, d * np.abs(d) / 4
        A = np.zeros((n + 2, n + 2))
        A[:n, :n] = 2 * K[1:, 1:]
        A[:n, n] = A[n, :n] = 1
        A[:n, n + 1] = A[n + 1, :n] = c
        z = np.linalg.solve(A, np.concatenate([2 * M[1:] + 2 * K[1:, 0], [1, 0]]))
        a, b = z[:n], np.concatenate([[-1], z[:n]])
        gradient = a * (-2 * dM + 2 * dK @ b)[1:] + z[n + 1] * a  # z[n + 1]: the multiplier of sum a c = 0
        return self.square - 2 * b @ M + b @ K @ b, gradient, a

    def descend(self, c):
        """From thresholds c to a minimum nearby: BFGS in c_1 and the logarithms of the gaps, which keeps the thresholds in
        order; then the gradient's zero itself."""
        def thresholds(q):
            return q[0] + np.concatenate([[0], np.cumsum(np.exp(q[1:]))])

        def value(q):
            try:
                if np.abs(q).max() < 30:  # no gap of 1e13, nor none at all
                    J, g, _ = self.solve(thresholds(q))
                    tails = np.cumsum(g[::-1])[::-1]  # moving c_i moves all after it
                    return J, np.concatenate([tails[:1], tails[1:] * np.exp(q[1:])])
            except np.linalg.LinAlgError:
                pass
            return 1e3, np.zeros(len(q))  # turn back
        q = np.concatenate([c[:1], np.log(np.diff(c) + 0.01)])
        return thresholds(optimize.minimize(value, q, jac=True, method="BFGS", options={"gtol": 1e-8, "maxiter": 600}).x)

STARTS = 40

def fit(function, bits, seed=1):
    """(thresholds, slopes) of the best of many starts. They are denser where h bends more: |h''|^(2/5) is the density that a best
    fit by many pieces has, and each threshold is drawn from its own part of that distribution."""
    if bits == 1:
        return np.array([0.0]), np.array([0.0, 1.0])
    h, n = FUNCTIONS[function][0], 2**bits - 1
    x, e = np.linspace(-10, 10, 4001), 1e-3
    mass = np.cumsum(np.abs(h(x + e) - 2 * h(x) + h(x - e))**0.4)
    rng, problem = np.random.RandomState(seed), Problem(h)
    with np.errstate(all="ignore"):
        found = [problem.descend(np.interp((np.arange(n) + rng.rand(n)) / n, mass / mass[-1], x)) for _ in range(STARTS)]
    c = min(found, key=lambda c: problem.solve(c)[0])
    c = optimize.root(lambda c: problem.solve(c)[1], c, tol=1e-14).x
    # h(x) - x/2 is even, so the mirror image of an optimum is one too: it is symmetric, and rounding alone kept it from being so
    # exactly, or of the two we take the one with more thresholds below 0.
    if np.abs(c + c[::-1]).max() < 1e-6:
        c = (c - c[::-1]) / 2
    elif (c > 0).sum() > (c < 0).sum():
        c = -c[::-1]
    slopes = np.concatenate([[0], np.cumsum(problem.solve(c)[2])])
    slopes[-1] = 1
    return c, slopes

def fit_slope(function):
    """(thresholds, slopes) of the four levels with the least squared error against h', x ~ N(0,1). h'(x) - 1/2 is odd, so they are
    symmetric: thresholds -c, 0, c, of which each level is the mean of h' in its part, and at c h' is in the middle of two levels."""
    slope = FUNCTIONS[function][1]

    def levels(c):
        def mean(lo, hi):
            weight = integral(lambda x: np.exp(-0.5 * x * x), lo, hi)
            return integral(lambda x: slope(x) * np.exp(-0.5 * x * x), lo, hi) / weight
        return mean(0, c), mean(c, 13)
    c = optimize.brentq(lambda c: slope(c) - sum(levels(c)) / 2, 0.1, 1.2, xtol=1e-15)
    inner, outer = levels(c)
    return np.array([-c, 0, c]), np.array([1 - outer, 1 - inner, inner, outer])

# ---- output ----------------------------------------------------------------------------------------

def report(function, bits, c, slopes):
    def line(what, c, slopes):
        error = slope_error(FUNCTIONS[function][1], c, slopes)
        print(f"{function}, {bits} bit{'s' * (bits > 1)}, {what}: error of the slope under N(0,1) {error:.4f}")
        for values in (c, slopes):
            print("    {" + ", ".join(repr(float(v)) for v in values) + "},")
    line("fitted", c, slopes)
    if bits == 2:
        line("published", *map(np.array, CODES[function][2]))
        line("by the slope", *fit_slope(function))

def plot(path, results):
    """h and h~ above, their derivatives below; results: {(function, bits): (thresholds, slopes)}."""
    plt = pyplot()
    if not plt:
        raise SystemExit(1)
    figure, axes = plt.subplots(2, len(results), squeeze=False, figsize=(3.6 * len(results), 5.2), constrained_layout=True)
    for (function, bits), (c, slopes), upper, lower in zip(results, results.values(), *axes):
        h, slope = FUNCTIONS[function]
        span = 10 if function == "silu" else 4
        x = np.linspace(-span, span, 2001)
        upper.plot(x, h(x), color="0.6", linewidth=3, label="h")
        upper.plot(x, (np.diff(slopes) * np.maximum(x[:, None] - c, 0)).sum(1), color="C3", linewidth=1, label="h~")
        upper.set(title=f"{function}, {bits} bit{'s' * (bits > 1)}", ylim=(-0.5, 0.5 * span))
        lower.plot(x, slope(x), color="0.6", linewidth=3, label="h'")
        edges = np.concatenate([[-span], c[np.abs(c) < span], [span]])
        shown = slopes[np.searchsorted(c, (edges[1:] + edges[:-1]) / 2)]
        lower.stairs(shown, edges, baseline=None, color="C3", linewidth=1, label="h~'")
        lower.set(ylim=(-0.25, 1.25), xlabel="x")
        for axis in (upper, lower):
            axis.grid(alpha=0.3)
            axis.legend(loc="upper left", frameon=False)
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    save(plt, figure, path, dpi=110)
    print(f"wrote {path}")

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--function", choices=[*FUNCTIONS, "all"], default="all")
    parser.add_argument("--bits", type=int, nargs="+", choices=[1, 2, 3, 4], default=[1, 2, 3, 4])
    parser.add_argument("--plot", metavar="FILE.png")
    a = parser.parse_args()
    functions = FUNCTIONS if a.function == "all" else [a.function]
    results = {(function, bits): fit(function, bits) for function in functions for bits in sorted(set(a.bits))}
    for (function, bits), found in results.items():
        report(function, bits, *found)
    if a.plot:
        plot(a.plot, results)

if __name__ == "__main__":
    main()
