"""What the types' Triton functions share: reading planes, and numbers out of what was read."""

from workbench_kernels.backend import jit, tl


@jit
def plane_at(w, count, before: tl.constexpr, size: tl.constexpr, block):
    """Where block `block` begins in the plane of `size` bytes a block, planes of `before` bytes a block being before it
    and all having `count` blocks."""
    return w + count * (before // 2) + block * (size // 2)


@jit
def words_at(place, j, inside):
    """32-bit words `j` from each of the places [n, S] on, [n, S, J]."""
    words = place.to(tl.pointer_type(tl.int32), bitcast=True)
    return tl.load(words[:, :, None] + j, mask=inside[:, :, None], other=0)


@jit
def word_at(place, index, inside):
    """The 32-bit word `index` from each of the places [n, S] on."""
    return tl.load(place.to(tl.pointer_type(tl.int32), bitcast=True) + index, mask=inside, other=0)


@jit
def pair_at(place, index, inside):
    """Words 2 `index` and 2 `index` + 1 from each of the places [n, S] on, read as one."""
    both = tl.load(place.to(tl.pointer_type(tl.int64), bitcast=True) + index, mask=inside, other=0)
    return both.to(tl.int32), (both >> 32).to(tl.int32)


@jit
def short_at(place, inside):
    """The 16 bits at each of the places [n, S], int32."""
    return tl.load(place, mask=inside, other=0).to(tl.int32)


@jit
def half_of(bits):
    """The low 16 bits of an integer as a float16's value."""
    return bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@jit
def byte_of(word, index):
    """Byte `index` (0: lowest) of an int32."""
    return (word >> (8 * index)) & 255
