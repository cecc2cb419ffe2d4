"""Bessel functions of order 0 and 1, and the Airy function Ai.

Source of the approximations and their coefficients: Cephes Mathematical Library, S. L. Moshier, 1989.
"""

import math

import jax.numpy as jnp
from jax.scipy.special import i0, i0e, i1, i1e
from torchax.ops import aten, lowering, table

# fmt: off
_PP0 = (
    0.0007969367292973471, 0.08283523921074408, 1.239533716464143, 5.447250030587687, 8.74716500199817,
    5.303240382353949, 1.0,
)
_PQ0 = (
    0.0009244088105588637, 0.08562884743544745, 1.2535274390105895, 5.470977403304171, 8.761908832370695,
    5.306052882353947, 1.0,
)
_QP0 = (
    -0.011366383889846916, -1.2825271867050931, -19.553954425773597, -93.20601521237683, -177.68116798048806,
    -147.07750515495118, -51.41053267665993, -6.050143506007285,
)
_QQ0 = (
    64.3178256118178, 856.4300259769806, 3882.4018360540163, 7240.467741956525, 5930.727011873169,
    2062.0933166032783, 242.0057402402914,
)
_JP0 = (
    -4794432209.782018, 1956174919465.5657, -249248344360967.72, 9708622510473064.0,
)
_JQ0 = (
    499.563147152651, 173785.4016763747, 48440965.83399621, 11185553704.535683, 2112775201154.892,
    310518229857422.56, 3.1812195594320496e+16, 1.7108629408104315e+18,
)
_YP0 = (
    15592.436785523574, -14663929.59039716, 5435264770.518765, -982136065717.9115, 87590639439536.7,
    -3466283033847297.0, 4.4273326857256984e+16, -1.8495080043698668e+16,
)
_YQ0 = (
    1041.2835366425984, 626107.330137135, 268919633.39381415, 86400248710.3935, 20297961275010.555,
    3171577528429750.5, 2.5059625617265306e+17,
)
_PP1 = (
    0.0007621256162081731, 0.07313970569409176, 1.1271960812968493, 5.112079511468076, 8.424045901417724,
    5.214515986823615, 1.0,
)
_PQ1 = (
    0.0005713231280725487, 0.06884559087544954, 1.105142326340617, 5.073863861286015, 8.399855543276042,
    5.209828486823619, 1.0,
)
_QP1 = (
    0.05108625947501766, 4.982138729512334, 75.82382841325453, 366.7796093601508, 710.8563049989261,
    597.4896124006136, 211.68875710057213, 25.207020585802372,
)
_QQ1 = (
    74.23732770356752, 1056.4488603826283, 4986.410583376536, 9562.318924047562, 7997.041604473507,
    2826.1927851763908, 336.0936078106983,
)
_JP1 = (
    -899971225.7055594, 452228297998.19403, -72749424522181.83, 3682957328638529.0,
)
_JQ1 = (
    620.8364781180543, 256987.25675774884, 83514679.14319493, 22151159547.97925, 4749141220799.914,
    784369607876235.9, 8.952223361846274e+16, 5.322786203326801e+18,
)
_YP1 = (
    1263204747.9017804, -647355876379.1603, 114509511541823.73, -8127702555013251.0, 2.024394757135949e+17,
    -7.788771962659501e+17,
)
_YQ1 = (
    594.3015923461282, 235564.09294306856, 73481194.44597217, 18760131610.870617, 3882312774962.3857,
    620557727146953.8, 6.871410873553005e+16, 3.9727060811656064e+18,
)
_KA0 = (
    1.374465435613523e-16, 4.25981614279661e-14, 1.0349695257633842e-11, 1.904516377220209e-09,
    2.5347910790261494e-07, 2.286212103119452e-05, 0.001264615411446926, 0.0359799365153615, 0.3442898999246285,
    -0.5353273932339028,
)
_KB0 = (
    5.300433772686263e-18, -1.6475804301524212e-17, 5.2103915050390274e-17, -1.678231096805412e-16,
    5.512055978524319e-16, -1.848593377343779e-15, 6.3400764774050706e-15, -2.2275133269916698e-14,
    8.032890775363575e-14, -2.9800969231727303e-13, 1.140340588208475e-12, -4.514597883373944e-12,
    1.8559491149547177e-11, -7.957489244477107e-11, 3.577397281400301e-10, -1.69753450938906e-09,
    8.574034017414225e-09, -4.660489897687948e-08, 2.766813639445015e-07, -1.8317555227191195e-06,
    1.39498137188765e-05, -0.00012849549581627802, 0.0015698838857300533, -0.0314481013119645, 2.4403030820659555,
)
_KA1 = (
    -7.023863479386288e-18, -2.427449850519366e-15, -6.666901694199329e-13, -1.4114883926335278e-10,
    -2.213387630734726e-08, -2.4334061415659684e-06, -0.0001730288957513052, -0.006975723859639864,
    -0.12261118082265715, -0.3531559607765449, 1.5253002273389478,
)
_KB1 = (
    -5.756744483665017e-18, 1.7940508731475592e-17, -5.689462558442859e-17, 1.838093544366639e-16,
    -6.057047248373319e-16, 2.038703165624334e-15, -7.019837090418314e-15, 2.4771544244813043e-14,
    -8.976705182324994e-14, 3.3484196660784293e-13, -1.2891739609510289e-12, 5.13963967348173e-12,
    -2.1299678384275683e-11, 9.218315187605006e-11, -4.1903547593418965e-10, 2.015049755197033e-09,
    -1.0345762465678097e-08, 5.7410841254500495e-08, -3.5019606030878126e-07, 2.406484947837217e-06,
    -1.936197974166083e-05, 0.00019521551847135162, -0.002857816859622779, 0.10392373657681724, 2.7206261904844427,
)
_AN = (
    0.346538101525629, 12.007595273964581, 76.27960536152345, 168.08922493463058, 159.75639135016442,
    70.53609068404442, 14.026469116338967, 1.0,
)
_AD = (
    0.5675945326387702, 14.75625625848472, 84.51389701414746, 177.31808814540045, 164.2346928715297,
    71.47784008255756, 14.095913560783403, 1.0,
)
_AFN = (
    -0.1316963234183318, -0.6264565444319123, -0.6931580360369335, -0.2797799815451191, -0.04919001326095003,
    -0.004062659235948854, -0.0001592764962392621, -2.776491081552329e-06, -1.6778769848911465e-08,
)
_AFD = (
    13.356042070655324, 32.682503279522464, 26.736704094149957, 9.187074029072596, 1.4752914677166642,
    0.11568717379518804, 0.004402916416152112, 7.547203482874142e-05, 4.5185009297058035e-07,
)
_AGN = (
    0.01973399320916857, 0.39110302961568827, 1.0657989759959559, 0.9391692298166502, 0.35146565610554764,
    0.06338889196289255, 0.005858041130483885, 0.000282851600836737, 6.98793669997261e-06, 8.117892395543892e-08,
    3.415517847659236e-10,
)
_AGD = (
    9.30892908077442, 19.835292871831214, 15.564662893286462, 5.476860694229755, 0.9542936116189619,
    0.08645808263523921, 0.004126565238242226, 0.00010125908511650914, 1.1716673321441352e-06, 4.9183457006293e-09,
)
# fmt: on


def _polynomial(coefficients, z):
    """Horner's rule, the leading coefficient first."""
    total = jnp.full_like(z, coefficients[0])
    for c in coefficients[1:]:
        total = total * z + c
    return total


def _chebyshev(coefficients, z):
    """Half the last difference of Clenshaw's recurrence."""
    p = q = jnp.zeros_like(z)
    a = jnp.full_like(z, coefficients[0])
    for c in coefficients[1:]:
        p, q = q, a
        a = z * q - p + c
    return 0.5 * (a - p)


def _phase_amplitude(x, order):
    """P, Q (5 / x included), the phase and the amplitude of the asymptotic expansion for x > 5."""
    pp, pq, qp, qq = ((_PP0, _PQ0, _QP0, _QQ0), (_PP1, _PQ1, _QP1, _QQ1))[order]
    z = 25.0 / (x * x)
    p = _polynomial(pp, z) / _polynomial(pq, z)
    q = 5.0 / x * (_polynomial(qp, z) / _polynomial(qq, z))
    return p, q, x - (0.25 + 0.5 * order) * math.pi, math.sqrt(2 / math.pi) / jnp.sqrt(x)


@lowering(aten.special_bessel_j0.default, promote="int_to_float")
def bessel_j0(x):
    """J0."""
    x = jnp.abs(x)
    z = jnp.minimum(x, 5.0) ** 2
    near = (z - 5.78318596294678452118) * (z - 30.4712623436620863991) * _polynomial(_JP0, z) / _polynomial(_JQ0, z)
    near = jnp.where(x < 0.00001, 1.0 - z / 4.0, near)
    p, q, phase, amplitude = _phase_amplitude(jnp.maximum(x, 5.0), 0)
    return jnp.where(x <= 5.0, near, (p * jnp.cos(phase) - q * jnp.sin(phase)) * amplitude)


@lowering(aten.special_bessel_j1.default, promote="int_to_float")
def bessel_j1(x):
    """J1."""
    size = jnp.abs(x)
    z = jnp.minimum(size, 5.0) ** 2
    near = (
        _polynomial(_JP1, z) / _polynomial(_JQ1, z) * size * (z - 14.6819706421238932572) * (z - 49.2184563216946036703)
    )
    p, q, phase, amplitude = _phase_amplitude(jnp.maximum(size, 5.0), 1)
    result = jnp.where(size <= 5.0, near, (p * jnp.cos(phase) - q * jnp.sin(phase)) * amplitude)
    return jnp.where(x < 0, -result, result)


def _second_kind(x, near, order):
    p, q, phase, amplitude = _phase_amplitude(jnp.maximum(x, 5.0), order)
    result = jnp.where(x <= 5.0, near, (p * jnp.sin(phase) + q * jnp.cos(phase)) * amplitude)
    return jnp.where(x == 0, -jnp.inf, jnp.where(x < 0, jnp.nan, result))


@lowering(aten.special_bessel_y0.default, promote="int_to_float")
def bessel_y0(x):
    """Y0."""
    z = jnp.clip(x, 0.0, 5.0) ** 2
    near = _polynomial(_YP0, z) / _polynomial(_YQ0, z) + 2 / math.pi * jnp.log(x) * bessel_j0(x)
    return _second_kind(x, near, 0)


@lowering(aten.special_bessel_y1.default, promote="int_to_float")
def bessel_y1(x):
    """Y1."""
    z = jnp.clip(x, 0.0, 5.0) ** 2
    near = x * (_polynomial(_YP1, z) / _polynomial(_YQ1, z)) + 2 / math.pi * (bessel_j1(x) * jnp.log(x) - 1.0 / x)
    return _second_kind(x, near, 1)


def _near_k0(x):
    return _chebyshev(_KA0, x * x - 2.0) - jnp.log(0.5 * x) * i0(x)


def _near_k1(x):
    return jnp.log(0.5 * x) * i1(x) + _chebyshev(_KA1, x * x - 2.0) / x


def _modified(near, coefficients, scaled):
    """K0 or K1, times exp(x) where it is scaled."""

    def modified_bessel_k(x):
        small, large = jnp.minimum(x, 2.0), jnp.maximum(x, 2.0)
        inner, outer = near(small), _chebyshev(coefficients, 8.0 / large - 2.0) / jnp.sqrt(large)
        if scaled:
            inner = inner * jnp.exp(small)
        else:
            outer = outer * jnp.exp(-large)
        return jnp.where(x == 0, jnp.inf, jnp.where(x < 0, jnp.nan, jnp.where(x <= 2.0, inner, outer)))

    return modified_bessel_k


@lowering(aten.special_airy_ai.default, promote="int_to_float")
def airy_ai(x):
    """Ai; NaN at the infinities, as torch has it."""
    left, right = jnp.minimum(x, -2.09), jnp.maximum(x, 2.09)
    zeta = -2.0 * left * jnp.sqrt(-left) / 3.0
    z = 1.0 / zeta
    f = 1.0 + z * z * _polynomial(_AFN, z * z) / _polynomial(_AFD, z * z)
    g = z * _polynomial(_AGN, z * z) / _polynomial(_AGD, z * z)
    phase = zeta + 0.25 * math.pi
    negative = 1 / math.sqrt(math.pi) / jnp.sqrt(jnp.sqrt(-left)) * (jnp.sin(phase) * f - jnp.cos(phase) * g)
    zeta = 2.0 * right * jnp.sqrt(right) / 3.0
    ratio = _polynomial(_AN, 1.0 / zeta) / _polynomial(_AD, 1.0 / zeta)
    positive = ratio / (2.0 * math.sqrt(math.pi) * jnp.sqrt(jnp.sqrt(right)) * jnp.exp(zeta))
    result = jnp.where(x < -2.09, negative, jnp.where(x >= 2.09, positive, _airy_series(jnp.clip(x, -2.09, 2.09))))
    result = jnp.where(x > 103.892, 0.0, result)
    return jnp.where(jnp.isinf(x), jnp.nan, result)


def _airy_series(x):
    """The Maclaurin series of Ai, for |x| <= 2.09: 20 terms reach float64's precision."""
    z = x**3
    f, g, m, n = jnp.ones_like(x), x, jnp.ones_like(x), x
    for k in range(1, 60, 3):
        m = m * z / ((k + 1) * (k + 2))
        n = n * z / ((k + 2) * (k + 3))
        f, g = f + m, g + n
    return 0.355028053887817239260 * f - 0.258819403792806798405 * g


@lowering(aten.special_spherical_bessel_j0.default, promote="int_to_float")
def spherical_bessel_j0(x):
    """sin(x) / x, its Maclaurin series near 0."""
    z = x * x
    series = 1.0 + z * _series(z)
    far = jnp.sin(x) / jnp.where(x == 0, 1, x)
    return jnp.where(jnp.isinf(x), 0.0, jnp.where(jnp.abs(x) < 0.5, series, far))


def _series(z):
    """(sin(x) / x - 1) / x**2 as a series of z = x**2."""
    return _polynomial([(-1.0) ** k / math.factorial(2 * k + 1) for k in range(6, 0, -1)], z)


BESSEL = table(
    {
        "i0": i0, "special_i0e": i0e, "special_i1": i1, "special_i1e": i1e, "special_modified_bessel_i0": i0,
        "special_modified_bessel_i1": i1, "special_modified_bessel_k0": _modified(_near_k0, _KB0, False),
        "special_modified_bessel_k1": _modified(_near_k1, _KB1, False),
        "special_scaled_modified_bessel_k0": _modified(_near_k0, _KB0, True),
        "special_scaled_modified_bessel_k1": _modified(_near_k1, _KB1, True),
    },
    promote="int_to_float",
)  # fmt: skip
