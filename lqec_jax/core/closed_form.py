"""Low-rank factors in closed form."""

import jax
import jax.numpy as jnp

# Columns of a random sketch beyond the rank.
OVERSAMPLING = 10


def truncate(error: jax.Array, rank: int) -> tuple[jax.Array, jax.Array]:
    """Returns the factors of the best rank-r approximation in the Frobenius norm.

    error ≈ a b,  a = U_r √S_r,  b = √S_r V_rᵀ  (Eckart & Young 1936), so that both factors have the
    same singular values and lose equally when they are stored in 16 bits.

    Args:
      error: float32 [d_in, d_out].
      rank: how many components to keep.
    Returns:
      (a [d_in, rank], b [rank, d_out]), float32.
    Cost: one thin SVD, O(d_in · d_out · min(d_in, d_out)).
    """
    u, s, vt = jnp.linalg.svd(error.astype(jnp.float32), full_matrices=False)
    root = jnp.sqrt(s[:rank])
    return u[:, :rank] * root, root[:, None] * vt[:rank]


def reduce_rank(error: jax.Array, gram: jax.Array, rank: int) -> tuple[jax.Array, jax.Array]:
    """Returns the factors of the rank-r matrix that leaves the least output error.

    argmin over C of tr((E - C)ᵀ G (E - C)) = T⁻¹ SVD_r(T E) for any T with Tᵀ T = G
                                            = E V_r V_rᵀ,  V_r as in `find_directions`,

    and what is left is Σ_{i>r} σ_i(T E)². The last form has neither a root nor an inverse of G, so
    G may be singular; and as each row of E is projected, no input's error ever grows.

    Args:
      error, gram, rank: as in `find_directions`.
    Returns:
      (a [d_in, rank], b [rank, d_out]), the halves of each component of equal norm.
    Cost: of `find_directions`.  jit: yes.
    """
    return project(error, find_directions(error, gram, rank)[1])


def regress(gram, cross, rank: int, *, outputs=None) -> tuple[jax.Array, jax.Array]:
    """Returns the factors of the rank-r matrix that predicts an output error best: all the others.

        argmin over M of E[(e - x̂ M) H (e - x̂ M)ᵀ] = W SVD_r(Wᵀ C Z) Yᵀ,
        R = E[x̂ᵀ x̂],  C = E[x̂ᵀ e],  W Wᵀ = R⁺,  H = Z Zᵀ,  Yᵀ Z = 1

    (reduced-rank regression, Izenman 1975): x̂ is what the weight reads in the compressed model and
    e what its output lacks, so e = x̂ E and H = 1 is `reduce_rank`, and e = x w - x̂ ŵ makes up for
    what came before the weight too. The roots are taken in eigenbases, after every input and output
    is brought to unit variance; what is below √n · ε of the largest eigenvalue, n the order, ε of
    the dtype, counts as zero, and there M is zero: in units of the inputs, the least of the best.

    Args:
      gram: R, floating [d_in, d_in], or its diagonal [d_in] where inputs count one by one. float32
        or wider is what all is computed in. A ridge, if wanted, is to be in it.
      cross: C = E[x̂ᵀ x] w - R ŵ for e = x w - x̂ ŵ, floating [d_in, d_out].
      rank: how many components, at most min(d_in, d_out).
      outputs: H [d_out, d_out], its diagonal [d_out], or None for the identity.
    Returns:
      (a [d_in, rank], b [rank, d_out]), the halves of each component of equal norm.
    Cost: an eigh of order d_in, and one of order d_out where `outputs` is whole, d_in² · d_out
      multiply-adds, then that of `find_directions` for a diagonal.  jit, vmap: yes.
    """
    inputs, whitened, sides = _whiten(gram, cross, outputs)
    basis = find_directions(whitened, jnp.ones_like(whitened[:, 0]), rank)[1]
    a = _times(_multiply(whitened, basis).T, inputs.T).T
    return balance(a, basis.T if sides is None else _times(basis.T, sides.T))


def regression_error(energy, gram, cross, rank: int, *, outputs=None) -> jax.Array:
    """Returns what `regress` leaves, the least of its rank: E[e H eᵀ] - Σ_{i<=r} σ_i(Wᵀ C Z)².

    Args:
      energy: E[e H eᵀ], scalar.
      gram, cross, rank, outputs: as in `regress`.
    """
    _, whitened, _ = _whiten(gram, cross, outputs)
    spectrum, _ = find_directions(whitened, jnp.ones_like(whitened[:, 0]), rank)
    return energy - jnp.sum(jnp.square(spectrum[:rank]))


def _whiten(gram, cross, outputs) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Returns (W, Wᵀ C Z, Y) of `regress`; Y is None without `outputs`."""
    dtype = jnp.promote_types(cross.dtype, jnp.float32)
    _, inputs = _split(gram.astype(dtype))
    whitened = _times(cross.astype(dtype).T, inputs).T
    if outputs is None:
        return inputs, whitened, None
    root, sides = _split(outputs.astype(dtype))
    return inputs, _times(whitened, root), sides


def _split(gram: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns (Z, Y), Z Zᵀ = G, Yᵀ Z = 1 where G is not zero, Y = 0 there; vectors for vectors."""
    if gram.ndim == 1:
        root = jnp.sqrt(jnp.maximum(gram, 0.0))
        return root, _invert(root)
    scale = jnp.sqrt(jnp.maximum(jnp.diagonal(gram), 0.0))
    inverse = _invert(scale)
    # Channels of unequal size are no reason to take the small ones for noise.
    unit = inverse[:, None] * (0.5 * (gram + gram.T)) * inverse
    values, vectors = jnp.linalg.eigh(unit, symmetrize_input=False)
    noise = len(values) ** 0.5 * jnp.finfo(gram.dtype).eps * values[-1]
    root = jnp.sqrt(jnp.where(values > noise, values, 0.0))
    return scale[:, None] * vectors * root, inverse[:, None] * vectors * _invert(root)


def _invert(size: jax.Array) -> jax.Array:
    return jnp.where(size > 0, 1.0 / jnp.where(size > 0, size, 1.0), 0.0)


def _times(x: jax.Array, factor: jax.Array) -> jax.Array:
    """Returns x F, for a matrix or its diagonal."""
    return x * factor if factor.ndim == 1 else _multiply(x, factor)


def complete(error: jax.Array, gram: jax.Array, a: jax.Array) -> jax.Array:
    """Returns the b that goes best with an a: argmin tr((E - a b)ᵀ G (E - a b)) = (aᵀGa)⁺ aᵀGE.

    Args:
      error, gram: as in `find_directions`.
      a: floating [d_in, r], of any rank.
    Returns:
      b [r, d_out], zero where a says nothing.
    Cost: d_in² · r multiply-adds for a whole gram, and d_in · r · d_out.  jit: yes.
    """
    seen = _weigh(gram, a)  # [d_in, r]
    _, inverse = _split(_multiply(a.T, seen))
    return _multiply(inverse, _multiply(inverse.T, _multiply(seen.T, error)))


def project(error: jax.Array, basis: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the factors of E V Vᵀ for orthonormal columns V [d_out, r], balanced."""
    return balance(_multiply(error.astype(basis.dtype), basis), basis.T)


def find_directions(error: jax.Array, gram: jax.Array, rank: int) -> tuple[jax.Array, jax.Array]:
    """Finds the directions of the outputs along which an error shows most.

    V are the leading eigenvectors of Eᵀ G E, whose eigenvalues are σ_i(T E)², Tᵀ T = G. With more
    outputs than inputs, Eᵀ = Q U (thin QR), and they are Q times those of U G Uᵀ, which is smaller.

    Args:
      error: E, floating [d_in, d_out]; float32 or wider is what it is computed in.
      gram: G = E[x xᵀ] [d_in, d_in], or its diagonal [d_in] where inputs count one by one. It is
        made symmetric; where it has no positive trace, it is taken for the identity.
      rank: how many directions, at most min(d_in, d_out). Those beyond the rank of T E are any
        that E has and G does not see.
    Returns:
      (all n = min(d_in, d_out) of σ, falling; V [d_out, rank], orthonormal).
    Cost: d_in² · d_out multiply-adds for a whole gram, O(d_in · d_out · n) for the rest, with an
      eigh of order n.  jit: yes.
    """
    error, gram, unit = _normalize(error, gram)
    if error.shape[0] < error.shape[1]:
        q, upper = jnp.linalg.qr(error.T)  # [d_out, d_in], [d_in, d_in]
        values, vectors = _find_eigen(upper.T, gram)
        basis = _multiply(q, vectors[:, :rank])
    else:
        values, vectors = _find_eigen(error, gram)
        basis = vectors[:, :rank]
    return unit * jnp.sqrt(jnp.maximum(values, 0.0)), basis


def sketch_directions(error, gram, rank: int, key: jax.Array, passes: int) -> tuple:
    """Finds `find_directions` nearly, by products alone: randomized subspace iteration.

    V spans (Eᵀ G E)^passes Eᵀ Ω, Ω random of rank + 10 columns, turned to the best rank directions
    of its span (Halko, Martinsson & Tropp 2011, arXiv:0909.4061). What is missed of component i
    falls like (σ_{rank+11} / σ_i)^(2 passes), so only what hardly differs from what is left anyway
    is missed. With normal errors and inputs, where the spectrum is as flat as it comes, 512 x 512
    at rank 64, what is left is 4 % above the least after 2 passes, 1.4 % after 4, 0.3 % after 8.

    Args:
      error, gram, rank: as in `find_directions`.
      key: random key.
      passes: how often Eᵀ G E is applied.
    Returns:
      (rank of σ, falling, each at most the true one; V [d_out, rank], orthonormal).
    Cost: (passes + 1) · (rank + 10) · (d_in² + 2 d_in · d_out) multiply-adds.  jit: yes.
    """
    error, gram, unit = _normalize(error, gram)
    width = min(rank + OVERSAMPLING, *error.shape)
    # Drawn over inputs: outputs in another order have their directions in that order.
    draw = jax.random.normal(key, (error.shape[0], width), error.dtype)
    start = jnp.linalg.qr(_multiply(error.T, draw))[0]  # [d_out, width]

    def sharpen(_, basis):
        seen = _weigh(gram, _multiply(error, basis))
        return jnp.linalg.qr(_multiply(error.T, seen))[0]

    basis = jax.lax.fori_loop(0, passes, sharpen, start)
    values, vectors = _find_eigen(_multiply(error, basis), gram)
    spectrum = unit * jnp.sqrt(jnp.maximum(values[:rank], 0.0))
    return spectrum, _multiply(basis, vectors[:, :rank])


def _find_eigen(error: jax.Array, gram: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the eigenvalues of Eᵀ G E, falling, and its eigenvectors as columns."""
    inner = _multiply(error.T, _weigh(gram, error))
    values, vectors = jnp.linalg.eigh(0.5 * (inner + inner.T), symmetrize_input=False)
    return values[::-1], vectors[:, ::-1]


def _normalize(error: jax.Array, gram: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Takes the units out of an error and a gram, so that no product over- or underflows.

    Returns:
      (error / largest entry; gram / mean diagonal, or the identity for one that says nothing; the
      unit of σ), in float32 or wider.
    """
    error = error.astype(jnp.promote_types(error.dtype, jnp.float32))
    gram = gram.astype(error.dtype)
    largest = jnp.max(jnp.abs(error))
    diagonal = gram if gram.ndim == 1 else jnp.diagonal(gram)
    mean = jnp.mean(diagonal)
    good = (mean > 0) & (mean < jnp.inf)
    unit = jnp.where(good, mean, 1.0)
    alike = jnp.ones_like(gram) if gram.ndim == 1 else jnp.eye(gram.shape[0], dtype=gram.dtype)
    gram = jnp.where(good, gram / unit, alike)
    return error / jnp.where(largest > 0, largest, 1.0), gram, largest * jnp.sqrt(unit)


def _weigh(gram: jax.Array, error: jax.Array) -> jax.Array:
    """Returns G E, for a gram or its diagonal."""
    return gram[:, None] * error if gram.ndim == 1 else _multiply(gram, error)


def _multiply(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.matmul(x, y, precision="highest")


def balance(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Rescales each component so that its two halves have the same norm; a b is unchanged.

    Training leaves a large and b small; stored in 16 bits, b would lose its smallest entries.
    A component with a zero half is left alone.

    Args:
      a, b: float32 [..., d_in, r] and [..., r, d_out].
    """
    a_norm = jnp.linalg.norm(a, axis=-2)  # [..., r]
    b_norm = jnp.linalg.norm(b, axis=-1)
    alive = (a_norm > 0) & (b_norm > 0)
    ratio = jnp.sqrt(jnp.where(alive, b_norm, 1.0) / jnp.where(alive, a_norm, 1.0))
    return a * ratio[..., None, :], b / ratio[..., :, None]
