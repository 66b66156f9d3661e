"""The public functions on packed samples of different sizes: against a call per sample."""

import doctest

import pytest
import torch

import da_triton
from da_triton import DoubleAttention, varlen
from da_triton.varlen import mask_from_sizes, pack, unpack
from support.cases import each_backend
from support.numerics import DEVICE, DTYPES, check, peaky, relative_rms

HEADS, M, N = 2, 3, 4
# Some neighbours are equal; two sequences are empty, one of them at the end.
LENGTHS = [5, 5, 12, 0, 12, 1, 7, 0]


def offsets_of(lengths, dtype=torch.int32):
    return torch.tensor([0, *lengths], dtype=dtype).cumsum(0, dtype=dtype)


def activations(*channels, lengths=LENGTHS, dtype=torch.float64, layout="channels first"):
    """``(1, c, total)``, from projections, or as a slice of a token-major tensor."""
    total = sum(lengths)
    if layout == "token-major":
        tokens = peaky(1, sum(channels), 1, total, dtype=dtype)[:, :, 0].mT.contiguous().mT
        return tokens.split(channels, 1)
    return [peaky(1, c, 1, total, dtype=dtype)[:, :, 0] for c in channels]


def each(function, lengths, *tensors, heads=HEADS, m=M, n=N, mask=None, extra=None, **options):
    """A call for each sequence alone, by the definition in float64; zeros for an empty one."""
    results = []
    masks = [None] * len(lengths) if mask is None else mask.split(lengths, -1)
    parts = zip(*(x.double().split(lengths, -1) for x in tensors), strict=True)
    for s, (part, mask) in enumerate(zip(parts, masks, strict=True)):
        here = dict(options)
        if mask is not None:
            here["mask"] = mask
        if extra is not None:
            here["extra"] = tuple(x.double()[s % len(x)][None] for x in extra)
        if part[0].shape[-1]:
            results.append(function(*part, heads=heads, backend="eager", **here))
        elif function is da_triton.gather:
            results.append(part[0].new_zeros(1, heads, m, n))
    return results


@each_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["channels first", "token-major"])
def test_every_sequence_is_a_sample_of_its_own(backend, dtype, layout):
    a, b, v = activations(HEADS * M, HEADS * N, HEADS * N, dtype=dtype, layout=layout)
    offsets = offsets_of(LENGTHS)
    options = {"heads": HEADS, "cu_seqlens": offsets, "backend": backend}
    expected = torch.cat(each(da_triton.gather, LENGTHS, a, b))
    g = da_triton.gather(a, b, **options)
    assert g.dtype == dtype
    check(g, expected, dtype)
    z = da_triton.distribute(g, v, cu_seqlens=offsets, backend=backend)
    whole = torch.cat(each(da_triton.double_attention, LENGTHS, a, b, v), -1)
    check(z, whole, dtype, slack=1 if dtype in (torch.float32, torch.float64) else 2)
    z = da_triton.double_attention(a, b, v, **options)
    assert (z.mT if layout == "token-major" else z).is_contiguous()
    check(z, whole, dtype)
    assert torch.equal(
        z, da_triton.double_attention(a, b, v, **{**options, "cu_seqlens": offsets.long()})
    )


def test_one_softmax_over_all_packed_positions_is_told_apart():
    a, b, v = activations(HEADS * M, HEADS * N, HEADS * N)
    z = da_triton.double_attention(a, b, v, heads=HEADS, cu_seqlens=offsets_of(LENGTHS))
    assert relative_rms(da_triton.double_attention(a, b, v, heads=HEADS), z) > 0.1
    shifted = [6, 4, *LENGTHS[2:]]
    other = da_triton.double_attention(a, b, v, heads=HEADS, cu_seqlens=offsets_of(shifted))
    assert relative_rms(other, z) > 0.01


@each_backend
def test_every_option_at_once(backend):
    a, b, v = activations(HEADS * M, HEADS * N, HEADS * N)
    mask = torch.rand(1, sum(LENGTHS), device=DEVICE) > 0.4
    mask[:, 10:22] = False  # the third sequence
    a, b = (x.masked_fill(~mask[:, None], torch.nan) for x in (a, b))
    options = {
        "heads": HEADS, "logit_scale": 0.6, "logit_scale_v": 0.7, "scale": 1.3, "softmax_v": False,
    }  # fmt: skip
    clean = [x.nan_to_num() for x in (a, b)]
    for count in (1, len(LENGTHS)):
        extra = tuple(peaky(count, HEADS * c, 1, 3, dtype=a.dtype)[:, :, 0] for c in (M, N))
        for tokens in (None, extra):
            expected = torch.cat(
                each(
                    da_triton.double_attention, LENGTHS, *clean, v, mask=mask, extra=tokens,
                    **options,
                ),
                -1,
            )  # fmt: skip
            for shape in (mask, mask[:, None]):
                z = da_triton.double_attention(
                    a, b, v, mask=shape, extra=tokens, cu_seqlens=offsets_of(LENGTHS),
                    backend=backend, **options,
                )  # fmt: skip
                check(z, expected, a.dtype)


@each_backend
def test_gradients_are_those_of_separate_calls(backend):
    tensors = [x.requires_grad_() for x in activations(HEADS * M, HEADS * N, HEADS * N)]
    extra = tuple(
        peaky(len(LENGTHS), HEADS * c, 1, 2, dtype=torch.float64)[:, :, 0].requires_grad_()
        for c in (M, N)
    )
    mask = torch.rand(1, sum(LENGTHS), device=DEVICE) > 0.3
    options = {"heads": HEADS, "logit_scale": 0.6, "mask": mask, "extra": extra}
    z = da_triton.double_attention(
        *tensors, **options, cu_seqlens=offsets_of(LENGTHS), backend=backend
    )
    expected = torch.cat(each(da_triton.double_attention, LENGTHS, *tensors, **options), -1)
    weights = torch.randn_like(z)
    leaves = [*tensors, *extra]
    right = torch.autograd.grad((weights * expected).sum(), leaves)
    for found, gradient in zip(
        torch.autograd.grad((weights * z).sum(), leaves), right, strict=True
    ):
        check(found, gradient, z.dtype)


@each_backend
def test_gradients_of_the_halves(backend):
    a, b, v = (x.requires_grad_() for x in activations(HEADS * M, HEADS * N, HEADS * N))
    offsets = offsets_of(LENGTHS)
    g = da_triton.gather(a, b, heads=HEADS, cu_seqlens=offsets, backend=backend)
    leaf = g.detach().requires_grad_()
    z = da_triton.distribute(leaf, v, cu_seqlens=offsets, backend=backend)
    weights = torch.randn_like(z)
    dg, dv = torch.autograd.grad((weights * z).sum(), [leaf, v])
    da, db = torch.autograd.grad((dg * g).sum(), [a, b])
    whole = torch.cat(each(da_triton.double_attention, LENGTHS, a, b, v), -1)
    right = torch.autograd.grad((weights * whole).sum(), [a, b, v])
    for found, gradient in zip((da, db, dv), right, strict=True):
        check(found, gradient, z.dtype)
    empty = torch.tensor([length == 0 for length in LENGTHS])
    assert not g[empty].any()
    assert not dg[empty].any()


@each_backend
def test_offsets_may_be_changed_before_the_backward_pass(backend):
    """A loader may reuse their memory, or make them in inference mode."""
    with torch.inference_mode():
        made = offsets_of(LENGTHS)
    leaves = [x.requires_grad_() for x in activations(HEADS * M, HEADS * N, HEADS * N)]
    results = []
    for offsets in (offsets_of(LENGTHS), made):
        z = da_triton.double_attention(*leaves, heads=HEADS, cu_seqlens=offsets, backend=backend)
        if offsets is not made:
            offsets.zero_()
        results.append(torch.autograd.grad(z.square().sum(), leaves))
    for found, expected in zip(*results, strict=True):
        assert torch.equal(found, expected)


@each_backend
def test_tokens_of_a_sequence_without_positions(backend):
    a, b, v = activations(HEADS * M, HEADS * N, HEADS * N, lengths=[4, 0])
    extra = [peaky(2, HEADS * c, 1, 3, dtype=a.dtype)[:, :, 0] for c in (M, N)]
    extra = [x.requires_grad_() for x in extra]
    z = da_triton.double_attention(
        a, b, v, heads=HEADS, extra=extra, cu_seqlens=offsets_of([4, 0]), backend=backend
    )
    (expected,) = each(da_triton.double_attention, [4, 0], a, b, v, extra=extra)
    check(z, expected, a.dtype)
    assert not torch.autograd.grad(z.sum(), extra[0])[0][1].any()


@each_backend
def test_nothing_packed(backend):
    """A batch whose sequences are all empty: zeros, and a training step goes through."""
    tensors = [torch.zeros(1, HEADS * c, 0, device=DEVICE, requires_grad=True) for c in (M, N, N)]
    options = {"cu_seqlens": torch.zeros(4, dtype=torch.int32), "backend": backend}
    g = da_triton.gather(*tensors[:2], heads=HEADS, **options)
    assert torch.equal(g, torch.zeros(3, HEADS, M, N, device=DEVICE))
    z = da_triton.double_attention(*tensors, heads=HEADS, **options)
    assert z.shape == (1, HEADS * M, 0)
    (z.sum() + da_triton.distribute(g, tensors[2], **options).sum()).backward()
    assert all(x.grad.shape == x.shape for x in tensors)


@each_backend
def test_autocast(backend):
    a, b, v = activations(HEADS * M, HEADS * N, HEADS * N, dtype=torch.float32)
    options = {"heads": HEADS, "cu_seqlens": offsets_of(LENGTHS), "backend": backend}
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        z = da_triton.double_attention(a, b, v, **options)
    half = [x.bfloat16() for x in (a, b, v)]
    assert z.dtype == torch.bfloat16
    assert torch.equal(z, da_triton.double_attention(*half, **options))


SHAPES = [(3, 4), (5, 2), (1, 7), (5, 2)]


def test_pack_and_unpack():
    images = [torch.randn(6, *shape, device=DEVICE) for shape in SHAPES]
    images[1] = images[1].permute(1, 2, 0).contiguous().permute(2, 0, 1)  # channels_last
    whole, offsets = pack(images)
    assert whole.shape == (1, 6, 39)
    assert offsets.tolist() == [0, 12, 22, 29, 39]
    assert (offsets.dtype, offsets.device.type) == (torch.int64, "cpu")
    for x, y in zip(images, unpack(whole, offsets, SHAPES), strict=True):
        assert torch.equal(x, y)
        assert y.data_ptr() != x.data_ptr()
        assert y.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
    assert [x.shape for x in unpack(whole, offsets)] == [(6, 12), (6, 10), (6, 7), (6, 10)]


def test_a_layer_on_packed_images():
    """The recipe of the README."""
    layer = DoubleAttention(6, heads=3, residual=True, dtype=torch.float64, device=DEVICE)
    images = [torch.randn(6, *shape, dtype=torch.float64, device=DEVICE) for shape in SHAPES]
    x, offsets = pack(images)
    a, b, v = (conv(x[..., None])[..., 0] for conv in (layer.convA, layer.convB, layer.convV))
    z = da_triton.double_attention(a, b, v, heads=layer.heads, cu_seqlens=offsets)
    y = x + layer.conv_reconstruct(z[..., None])[..., 0]
    for image, found in zip(images, unpack(y, offsets, SHAPES), strict=True):
        check(found, layer(image[None])[0], image.dtype)


@pytest.mark.parametrize("kind", [list, torch.tensor])
def test_mask_from_sizes_is_padding(kind):
    layer = DoubleAttention(6, residual=True, dtype=torch.float64, device=DEVICE)
    sizes = [(3, 4), (5, 2), (1, 7)]
    mask = mask_from_sizes(kind(sizes), (5, 7), device=DEVICE)
    assert mask.shape == (3, 5, 7)
    x = torch.randn(3, 6, 5, 7, dtype=torch.float64, device=DEVICE)
    y = layer(x, mask)
    for i, (h, w) in enumerate(sizes):
        assert mask[i].sum() == h * w
        check(y[i : i + 1, :, :h, :w], layer(x[i : i + 1, :, :h, :w]), x.dtype)


def test_mask_from_sizes_of_one_to_three_axes():
    assert mask_from_sizes([[2], [0]], (3,)).tolist() == [[True, True, False], [False] * 3]
    mask = mask_from_sizes([(1, 2, 3), (2, 1, 1)], (2, 2, 3))
    assert mask.sum((1, 2, 3)).tolist() == [6, 2]
    assert mask[0, 0].all()
    assert mask[1, :, 0, 0].all()


A, B, V = torch.zeros(1, 4, 9), torch.zeros(1, 6, 9), torch.zeros(1, 6, 9)
G = torch.zeros(2, 1, 4, 6)
GOOD = torch.tensor([0, 4, 9])


def gather(offsets, a=A, b=B, **options):
    return lambda: da_triton.gather(a, b, cu_seqlens=offsets, **options)


def core(offsets, v=V, **options):
    return lambda: da_triton.double_attention(A, B, v, cu_seqlens=offsets, **options)


def distribute(g=G, v=V):
    return lambda: da_triton.distribute(g, v, cu_seqlens=GOOD)


ERRORS = [
    (gather([0, 4, 9]), TypeError, r"int32 or int64, got list. Use torch.tensor\(cu_seqlens\)"),
    (gather(GOOD.float()), TypeError, r"got torch.float32. Convert it with cu_seqlens.long\(\)"),
    (gather(GOOD.bool()), TypeError, "got torch.bool"),
    (gather(GOOD[None]), ValueError, r"must be \(S \+ 1,\).*got shape \(1, 3\)"),
    (gather(GOOD[:1]), ValueError, r"S ≥ 1 sequences.*got shape \(1,\)"),
    (gather(GOOD.to("meta")), RuntimeError, "on the meta device. Keep it on the CPU"),
    (gather(torch.tensor([1, 4, 9])), ValueError, r"begin with 0, got 1. Make offsets.*cumsum"),
    (gather(torch.tensor([4, 5])), ValueError, "begin with 0, got 4"),
    (
        gather(torch.tensor([0, 9, 4, 9])),
        ValueError,
        "non-decreasing, got 4 after 9. Make offsets",
    ),
    (gather(torch.tensor([0, 4, 8])), ValueError, "end with the 9 positions of a, got 8"),
    (gather(torch.tensor([0, 4, 10])), ValueError, "end with the 9 positions of a, got 10"),
    (gather(GOOD, torch.zeros(2, 4, 9), torch.zeros(2, 6, 9)), ValueError, r"a must be \(1, chan"),
    (gather(GOOD, A[..., None], B[..., None]), ValueError, r"got shape \(1, 4, 9, 1\).*pack"),
    (gather(GOOD, mask=torch.ones(2, 9).bool()), ValueError, r"\(1, 9\).*got \(2, 9\)"),
    (core(GOOD, v=V[..., :4]), ValueError, "end with the 4 positions of v, got 9"),
    (core(GOOD, v=V[..., None]), ValueError, r"v must be \(1, channels, total\)"),
    (core(GOOD, extra=(A[:, :, :1].expand(3, 4, 1), B[:, :, :1])), ValueError, "N = 2"),
    (distribute(g=G[:1]), ValueError, r"g must have a sample for each of 2 packed sequences"),
    (distribute(g=G[:, :, :, :5]), ValueError, "v must have heads·n = 1·5 channels"),
    (lambda: pack([]), TypeError, "one or more tensors.*got an empty list"),
    (lambda: pack(iter([])), TypeError, "one or more tensors.*got list_iterator"),
    (lambda: pack([torch.zeros(())]), ValueError, r"channels of samples\[0\].*got shape \(\)"),
    (lambda: pack(A), TypeError, "must be a list.*got Tensor"),
    (lambda: pack([A, 1]), TypeError, r"samples\[1\] must be a torch.Tensor, got int"),
    (
        lambda: pack([A[0], B[0]]),
        ValueError,
        r"samples\[1\].*channels of samples.*got shape \(6, 9\)",
    ),
    (
        lambda: pack([A[0], A[0].half()]),
        TypeError,
        r"samples\[1\] must share one dtype",
    ),
    (lambda: pack([A[0], A[0].to("meta")]), RuntimeError, "must be on one device"),
    (lambda: pack([A[0, 0]]), ValueError, r"samples\[0\] must be \(C, \*positions\)"),
    (lambda: unpack(A, torch.tensor([0, 8])), ValueError, "end with the 9 positions of packed"),
    (lambda: unpack(A, GOOD, [(2, 2), (2, 3)]), ValueError, r"lengths \[4, 5\], got \[\(2, 2\)"),
    (lambda: unpack(A, GOOD, [(2, 2)]), ValueError, r"lengths \[4, 5\]"),
    (lambda: mask_from_sizes([(1.0, 2.0)], (3, 3)), TypeError, "integers, got torch.float32"),
    (lambda: mask_from_sizes([(1, 2)], (3,)), ValueError, r"shape \(1, 2\) and shape=\(3,\)"),
    (lambda: mask_from_sizes([1, 2], (3, 3)), ValueError, r"sizes must be \(N, axes\)"),
    (lambda: mask_from_sizes([[1] * 4], (3,) * 4), ValueError, "1 to 3"),
    (lambda: mask_from_sizes([(4, 2)], (3, 3)), ValueError, r"0 to shape=\(3, 3\), got \[\[4, 2"),
    (lambda: mask_from_sizes([(-1, 2)], (3, 3)), ValueError, "after downsampling"),
]


@pytest.mark.parametrize(("call", "error", "message"), ERRORS)
def test_errors(call, error, message):
    with pytest.raises(error, match=f"(?s){message}"):
        call()


def test_a_process_group_beside_packed_positions_is_rejected(monkeypatch):
    monkeypatch.setattr("da_triton.checks.process_group", lambda *_: None)
    with pytest.raises(ValueError, match="Give each rank sequences of its own"):
        da_triton.gather(A, B, cu_seqlens=GOOD, process_group=object())


def test_the_module_shows_what_it_does():
    result = doctest.testmod(varlen)
    assert result.attempted
    assert not result.failed
