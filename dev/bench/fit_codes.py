"""Where the constants of the activation codes come from: the best h~ for GELU and SiLU, 1 to 4 bits.

    python3 dev/bench/fit_codes.py                                  all functions, 1 to 4 bits
    python3 dev/bench/fit_codes.py --function gelu-tanh --bits 3 4 --plot build/codes.png

The backward pass of an activation h uses the derivative of
    h~(x) = sum_i a_i max(x - c_i, 0),  i = 1 .. 2^k - 1,  sum a_i = 1,  sum a_i c_i = 0,
a step function of 2^k levels, so k bits say which level an x has. The two constraints say that
h~ -> 0 to the left and h~ -> x to the right. (a, c) minimise the integral of (h - h~)^2 over the
line (Yang et al., ICML 2024, arXiv 2406.16282). Nothing else goes in: 2 bits come out beside the
published constants, and the other tables of prepro/codes.py are this program's output.

Needs SciPy, and for --plot Matplotlib: apt-get install python3-scipy python3-matplotlib.
"""
import argparse
import math
import os
import sys

import numpy as np

try:
    from scipy import optimize, special
except ImportError:
    raise SystemExit("fit_codes.py needs SciPy: apt-get install python3-scipy, "
                     "or pip install scipy in a venv") from None

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "../../prepro"))
from codes import CODES  # noqa: E402


# ----------------------------------------------------------------------------
# the activations, and their derivatives

def gelu_tanh(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def gelu_tanh_slope(x):
    t = np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))
    return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * x * x)


def gelu_erf(x):
    return x * special.ndtr(x)


def gelu_erf_slope(x):
    return special.ndtr(x) + x * np.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)


def silu(x):
    return x * special.expit(x)


def silu_slope(x):
    s = special.expit(x)
    return s + x * s * (1 - s)


FUNCTIONS = {"gelu-tanh": (gelu_tanh, gelu_tanh_slope),
             "gelu-erf": (gelu_erf, gelu_erf_slope),
             "silu": (silu, silu_slope)}
PUBLISHED = {"gelu-tanh": CODES["gelu-tanh"][2], "gelu-erf": CODES["gelu-tanh"][2], "silu": CODES["silu"][2]}

# ----------------------------------------------------------------------------
# integrals: Gauss-Legendre with 16 nodes on panels of at most half a unit. That is exact to double
# precision for these functions wherever they are smooth, so a panel must not contain a kink.

NODES, WEIGHTS = np.polynomial.legendre.leggauss(16)
FAR = 60.0  # beyond it |h - max(x, 0)| is below 1e-24 for all three


def integral(f, lo, hi):
    edges = np.linspace(lo, hi, max(1, math.ceil(2 * (hi - lo))) + 1)
    half = np.diff(edges)[:, None] / 2
    return float((half * WEIGHTS * f(edges[:-1, None] + half + half * NODES)).sum())


def integral_pieces(f, edges):
    """f(x, i): the i-th piece lies between edges i and i + 1."""
    return sum(integral(lambda x, i=i: f(x, i), edges[i], edges[i + 1]) for i in range(len(edges) - 1))


def objective(h, c, slopes):
    """The integral of (h - h~)^2, directly; the fit below gets it another way."""
    edges = np.concatenate([[-FAR], c, [FAR]])
    at = np.concatenate([[0, 0], np.cumsum(slopes[1:-1] * np.diff(c))])  # h~ where each piece begins
    return integral_pieces(lambda x, i: (h(x) - (at[i] + slopes[i] * (x - edges[i])))**2, edges)


def normal(x):
    return np.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)


def slope_error(slope, c, slopes):
    """Relative squared error of h~' against h', x ~ N(0,1)."""
    edges = np.concatenate([[-13.0], c, [13.0]])
    return integral_pieces(lambda x, i: (slope(x) - slopes[i])**2 * normal(x), edges) \
        / integral(lambda x: slope(x)**2 * normal(x), -13, 13)


def best_step_error(slope, levels):
    """The same error of the best step function of so many levels, which no h~ constrains: by
    dynamic programming over cells of 0.01, so it is the best there is."""
    edges = np.linspace(-6, 6, 1201)
    x = edges[:-1, None] + 0.005 + 0.005 * NODES
    mass, first, second = (np.concatenate([[0], np.cumsum((0.005 * WEIGHTS * normal(x) * v).sum(1))])
                           for v in (1, slope(x), slope(x)**2))
    with np.errstate(divide="ignore", invalid="ignore"):
        m, f, s = (np.subtract.outer(v, v).T for v in (mass, first, second))  # cells i to j: [i, j]
        cost = np.where(m > 0, s - f * f / m, np.inf)
    best = cost[0]
    for _ in range(levels - 1):
        best = (best[:, None] + cost).min(0)
    return best[-1] / second[-1]


# ----------------------------------------------------------------------------
# the fit

class Problem:
    """The objective as a function of c alone, a eliminated, with an exact gradient.

    Let r(x) = h(x) - max(x, 0) and give max(x, 0) itself the weight -1: with points p = (0, c) and
    weights b = (-1, a), h~ - max(x, 0) = sum b_i max(x - p_i, 0). The constraints are sum b_i = 0
    and sum b_i p_i = 0, so this is zero beyond the outermost point on either side, and
        objective = int r^2 - 2 sum_i b_i M(p_i) + sum_ij b_i b_j |p_i - p_j|^3 / 12,
    M(p) = int_p^inf (x - p) r(x) dx, M' = -int_p^inf r, M'' = r; |x|^3/12 is the function whose
    fourth derivative is a unit impulse. Quadratic in a, so a linear system gives a for each c.
    """

    def __init__(self, h):
        self.h = h
        self.square = integral(lambda x: h(x)**2, -FAR, 0) + integral(lambda x: (h(x) - x)**2, 0, FAR)
        self.m0 = integral(lambda x: h(x) - x, 0, FAR)
        self.m1 = integral(lambda x: x * (h(x) - x), 0, FAR)
        panels = 32  # between 0, where r has its kink, and p
        self.u = ((np.arange(panels)[:, None] + 0.5 + 0.5 * NODES) / panels).ravel()
        self.w = np.tile(WEIGHTS / (2 * panels), panels)

    def r(self, x):
        return self.h(x) - np.maximum(x, 0)

    def moments(self, p):
        """M, M' and M'' at each p."""
        x = p[:, None] * self.u
        r = self.r(x)
        return (self.m1 - p * self.m0 - p * ((r * (x - p[:, None])) @ self.w),
                -self.m0 + p * (r @ self.w), self.r(p))

    def solve(self, c):
        """The best a for these thresholds. Returns the objective, its gradient in c, a, and the
        multipliers of the two constraints."""
        n, p = len(c), np.concatenate([[0], c])
        M, dM, _ = self.moments(p)
        d = p[:, None] - p
        K, dK = np.abs(d)**3 / 12, d * np.abs(d) / 4
        A = np.zeros((n + 2, n + 2))
        A[:n, :n] = 2 * K[1:, 1:]
        A[:n, n] = A[n, :n] = 1
        A[:n, n + 1] = A[n + 1, :n] = c
        z = np.linalg.solve(A, np.concatenate([2 * M[1:] + 2 * K[1:, 0], [1, 0]]))
        a, multipliers = z[:n], z[n:]
        b = np.concatenate([[-1], a])
        gradient = a * (-2 * dM + 2 * dK @ b)[1:] + multipliers[1] * a
        return self.square - 2 * b @ M + b @ K @ b, gradient, a, multipliers

    def descend(self, c):
        """From thresholds c to a minimum nearby: BFGS in c_1 and the logarithms of the gaps, which
        keeps the thresholds in order."""
        def thresholds(q):
            return q[0] + np.concatenate([[0], np.cumsum(np.exp(q[1:]))])

        def value(q):
            if np.abs(q).max() > 30:  # a gap of 1e13, or none: turn back
                return 1e3, np.zeros(len(q))
            c = thresholds(q)
            try:
                J, g, _, _ = self.solve(c)
            except np.linalg.LinAlgError:
                return 1e3, np.zeros(len(q))
            tails = np.cumsum(g[::-1])[::-1]  # moving c_i moves all behind it
            return J, np.concatenate([tails[:1], tails[1:] * np.exp(q[1:])])

        q = np.concatenate([c[:1], np.log(np.diff(c) + 0.01)])
        return thresholds(optimize.minimize(value, q, jac=True, method="BFGS",
                                            options={"gtol": 1e-8, "maxiter": 600}).x)

    def polish(self, c):
        """Newton's method on the conditions of the optimum, in a, c and the multipliers."""
        n = len(c)
        _, _, a, (lam, mu) = self.solve(c)
        for _ in range(12):
            p, b = np.concatenate([[0], c]), np.concatenate([[-1], a])
            M, dM, ddM = (m[1:] for m in self.moments(p))
            d = (p[:, None] - p)[1:]
            K, dK, ddK = np.abs(d)**3 / 12, d * np.abs(d) / 4, np.abs(d) / 2
            G = -2 * dM + 2 * dK @ b + mu
            F = np.concatenate([-2 * M + 2 * K @ b + lam + mu * c, G, [a.sum() - 1, a @ c]])
            J = np.zeros((2 * n + 2, 2 * n + 2))
            J[:n, :n] = 2 * K[:, 1:]
            J[:n, n:2 * n] = np.diag(G) - 2 * dK[:, 1:] * a
            J[:n, -2], J[:n, -1], J[n:2 * n, -1] = 1, c, 1
            J[n:2 * n, :n] = 2 * dK[:, 1:]
            J[n:2 * n, n:2 * n] = np.diag(-2 * ddM + 2 * ddK @ b) - 2 * ddK[:, 1:] * a
            J[-2, :n], J[-1, :n], J[-1, n:2 * n] = 1, c, a
            step = np.linalg.solve(J, -F)
            a, c, lam, mu = a + step[:n], c + step[n:2 * n], lam + step[-2], mu + step[-1]
            if np.abs(step[n:2 * n]).max() < 1e-14:
                break
        return c, a


STARTS = 40
SAME = 1e-9  # of thresholds, and relative of the objective: two starts found one optimum


def random_starts(h, n, seed):
    """Thresholds are denser where h bends more: |h''|^(2/5) is the density that a best fit by many
    pieces has. Each threshold is drawn from its own n-th part of that distribution."""
    x, e = np.linspace(-10, 10, 4001), 1e-3
    mass = np.cumsum(np.abs(h(x + e) - 2 * h(x) + h(x - e))**0.4)
    rng = np.random.RandomState(seed)
    return [np.interp((np.arange(n) + rng.rand(n)) / n, mass / mass[-1], x) for _ in range(STARTS)]


def fit(function, bits, seed=1):
    """Returns a dict: c, slopes, objective; how many starts agree, and how well; symmetric or not."""
    h, _ = FUNCTIONS[function]
    if bits == 1:  # the constraints leave a = 1, c = 0 and no other choice
        c, slopes = np.array([0.0]), np.array([0.0, 1.0])
        return {"c": c, "slopes": slopes, "objective": objective(h, c, slopes), "agree": None}
    problem = Problem(h)
    found = []
    for start in random_starts(h, 2**bits - 1, seed):
        with np.errstate(all="ignore"):
            c = problem.descend(start)
            found.append((problem.solve(c)[0], c))
    found.sort(key=lambda item: item[0])
    polished = []
    for J, c in found:
        if J > found[0][0] * (1 + 1e-5):
            break
        c, a = problem.polish(c)
        # h(x) - x/2 is even, so the mirror image of an optimum is one too. Where that is another
        # one, take the one with more thresholds below 0.
        if (c > 0).sum() > (c < 0).sum():
            c, a = -c[::-1], a[::-1]
        polished.append((c, a))
    c, a = polished[0]
    apart = [float(np.abs(other - c).max()) for other, _ in polished]
    agree = [v for v in apart if v < SAME]
    asymmetry = max(np.abs(c + c[::-1]).max(), np.abs(a - a[::-1]).max())
    symmetric = asymmetry < SAME
    if symmetric:  # then exactly so: rounding alone kept the middle from 0
        c, a = (c - c[::-1]) / 2, (a + a[::-1]) / 2
    slopes = np.concatenate([[0], np.cumsum(a)])
    if symmetric:
        slopes = (slopes + 1 - slopes[::-1]) / 2
    slopes[0], slopes[-1] = 0, 1
    best = objective(h, c, slopes)
    second = [J for J, _ in found if J > found[0][0] * (1 + 1e-5)]
    return {"c": c, "slopes": slopes, "objective": best, "agree": len(agree), "spread": max(agree),
            "asymmetry": float(asymmetry), "symmetric": bool(symmetric),
            "second": second[0] if second else None}


def identities(c, slopes):
    """sum a - 1 and sum a c, which h~ needs to be 0 on the left and x on the right."""
    a = np.diff(slopes)
    return math.fsum(a) - 1, math.fsum(a * np.asarray(c))


# ----------------------------------------------------------------------------
# output

def braces(values):
    return "{" + ", ".join(repr(float(v)) for v in values) + "}"


def report(function, bits, result):
    h, slope = FUNCTIONS[function]
    c, slopes = result["c"], result["slopes"]
    print(f"{function}, {bits} bit{'s' * (bits > 1)}: {len(c)} threshold{'s' * (bits > 1)}, {len(slopes)} slopes")
    print(f"  objective {result['objective']:.10g}   error of the slope under N(0,1) "
          f"{slope_error(slope, c, slopes):.4f}, of the best step of {2**bits} levels "
          f"{best_step_error(slope, 2**bits):.4f}")
    if bits == 1:
        print("  nothing to fit: one threshold with sum a = 1 and sum a c = 0 is a = 1, c = 0, which is ReLU")
    else:
        print(f"  {result['agree']} of {STARTS} random starts ended there, thresholds equal to "
              f"{result['spread']:.1e}; the next best end: "
              + (f"{result['second']:.10g}" if result["second"] else "none"))
        print("  symmetric about 0 (to {:.1e}, then made exact)".format(result["asymmetry"]) if result["symmetric"]
              else "  not symmetric: its mirror image is as good; this is the one with more thresholds below 0")
        print("  sum a - 1 = {:.1e}, sum a c = {:.1e}".format(*identities(c, slopes)))
    if bits == 2:
        old_c, old_slopes = map(np.array, PUBLISHED[function])
        print(f"  published: objective {objective(h, old_c, old_slopes):.10g}   error of the slope "
              f"{slope_error(slope, old_c, old_slopes):.4f}")
        print("  published: sum a - 1 = {:.1e}, sum a c = {:.1e}".format(*identities(old_c, old_slopes)))
        print(f"  published: {braces(old_c)},\n             {braces(old_slopes)}")
    print(f"    // {function}, {bits} bit{'s' * (bits > 1)}: thresholds, slopes of codes 0 to {2**bits - 1}")
    print(f"    {{{braces(c)},\n     {braces(slopes)}}},")
    print()


def plot(path, results):
    try:
        import matplotlib
    except ImportError:
        raise SystemExit("fit_codes.py --plot needs Matplotlib: apt-get install python3-matplotlib, "
                         "or leave --plot out") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    functions, all_bits = list(results), list(next(iter(results.values())))
    figure, axes = plt.subplots(2 * len(functions), len(all_bits), squeeze=False, sharex="row",
                                figsize=(3.6 * len(all_bits), 5.2 * len(functions)), constrained_layout=True)
    for i, function in enumerate(functions):
        h, slope = FUNCTIONS[function]
        span = 10 if function == "silu" else 4
        x = np.linspace(-span, span, 2001)
        for j, bits in enumerate(all_bits):
            c, slopes = results[function][bits]["c"], results[function][bits]["slopes"]
            a = np.diff(slopes)
            upper, lower = axes[2 * i][j], axes[2 * i + 1][j]
            upper.plot(x, h(x), color="0.6", linewidth=3, label="h")
            upper.plot(x, (a * np.maximum(x[:, None] - c, 0)).sum(1), color="C3", linewidth=1, label="h~")
            upper.set_title(f"{function}, {bits} bit{'s' * (bits > 1)}")
            lower.plot(x, slope(x), color="0.6", linewidth=3, label="h'")
            edges = np.concatenate([[-span], c[np.abs(c) < span], [span]])
            shown = slopes[np.searchsorted(c, (edges[1:] + edges[:-1]) / 2)]
            lower.stairs(shown, edges, baseline=None, color="C3", linewidth=1, label="h~'")
            for axis in (upper, lower):
                axis.grid(alpha=0.3)
                axis.legend(loc="upper left", frameon=False)
            upper.set_ylim(-0.5, 0.5 * span)
            lower.set_ylim(-0.25, 1.25)
            lower.set_xlabel("x")
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    print(f"wrote {path}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--function", choices=[*FUNCTIONS, "all"], default="all")
    parser.add_argument("--bits", type=int, nargs="+", choices=[1, 2, 3, 4], default=[1, 2, 3, 4])
    parser.add_argument("--plot", metavar="FILE.png")
    a = parser.parse_args()
    results = {}
    for function in FUNCTIONS if a.function == "all" else [a.function]:
        results[function] = {}
        for bits in sorted(set(a.bits)):
            results[function][bits] = fit(function, bits)
            report(function, bits, results[function][bits])
    if a.plot:
        try:
            plot(a.plot, results)
        except (OSError, ValueError) as e:
            raise SystemExit(f"fit_codes.py: {a.plot}: could not write it: {e}") from None


if __name__ == "__main__":
    main()
