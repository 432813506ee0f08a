"""Outputs held against public implementations with the same weights, where the mathematics is the same."""

import pytest
import torch
from mechanisms import heads_of, relative_error

from effvit import build_attention
from effvit.measure.memory import peak_bytes
from effvit.measure.peers import MODES, build_ours
from effvit.measure.public import PEERS, PLAIN

pytestmark = pytest.mark.slow

REASON = "a peer to compare with: pip install effvit[peers]"
WIDTH, HEADS, GRID, TOKENS = 12, 3, (3, 5), 16


def ours(name, heads=HEADS, **options):
    torch.manual_seed(0)
    return build_attention(name, WIDTH, heads, GRID, **options).eval()


@pytest.fixture
def x():
    return torch.randn(2, TOKENS, WIDTH, generator=torch.Generator().manual_seed(1))


def test_fused_is_timms_attention_name_for_name(x):
    layers = pytest.importorskip("timm.layers", reason=REASON)
    mine = ours("fused")
    theirs = layers.Attention(WIDTH, num_heads=HEADS, qkv_bias=True).eval()
    theirs.load_state_dict(mine.state_dict())
    torch.testing.assert_close(mine(x), theirs(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("share", ["heads", "none"])
def test_linformer_is_the_package_linformer(x, share):
    # Theirs has no bias in the maps, holds E and F transposed, and projects after the key and value maps. Its
    # `share_kv` also makes values and keys the same, which the paper's E = F does not, so that mode is not compared.
    linformer = pytest.importorskip("linformer", reason=REASON)
    mine = ours("linformer", k=5, share=share, qkv_bias=False)
    theirs = linformer.LinformerSelfAttention(WIDTH, TOKENS, k=5, heads=HEADS).eval()
    q, k, v = mine.qkv.weight.chunk(3)
    with torch.no_grad():
        if share == "none":  # with all heads given the same E it is the shared one
            mine.E.copy_(mine.E[:1].expand_as(mine.E))
            mine.F.copy_(mine.F[:1].expand_as(mine.F))
    e, f = (p[0] if share == "none" else p for p in (mine.E, mine.F))
    state = {"to_q.weight": q, "to_k.weight": k, "to_v.weight": v, "proj_k": e.T, "proj_v": f.T}
    state |= {"to_out.weight": mine.proj.weight, "to_out.bias": mine.proj.bias}
    theirs.load_state_dict(state)
    torch.testing.assert_close(mine(x), theirs(x), rtol=1e-5, atol=1e-6)


@pytest.fixture
def performer_pytorch():
    return pytest.importorskip("performer_pytorch.performer_pytorch", reason=REASON, exc_type=ImportError)


def qkv(x, attention):
    return [heads_of(part, HEADS) for part in attention.qkv(x).chunk(3, dim=-1)]


def test_performers_softmax_kernel_is_performer_pytorchs(x, performer_pytorch):
    # Theirs takes the maximum over Ωx̂ alone, without -‖x̂‖²/2, and adds 1e-4 inside the scale instead of 1e-6
    # outside: without either ε the constants cancel and the quotient is the same.
    mine = ours("performer", num_features=20)
    q, k, v = qkv(0.5 * x, mine)
    phi_q, phi_k = (
        performer_pytorch.softmax_kernel(t, projection_matrix=mine.omega, is_query=is_query, eps=0.0)
        for t, is_query in ((q, True), (k, False))
    )
    expected = performer_pytorch.linear_attention(phi_q, phi_k, v)
    torch.testing.assert_close(mine.attend(q, k, v), expected, rtol=1e-4, atol=1e-4)


def test_performers_relu_kernel_is_performer_pytorchs_generalized_attention(x, performer_pytorch):
    # Theirs leaves the factor m^-½ out, which cancels in the quotient once its ε is scaled by m^½.
    mine = ours("performer", num_features=20, kernel="relu")
    q, k, v = qkv(x, mine)
    phi_q, phi_k = (
        performer_pytorch.generalized_kernel(t, projection_matrix=mine.omega, kernel_epsilon=1e-3 * 20**0.5)
        for t in (q, k)
    )
    expected = performer_pytorch.linear_attention(phi_q, phi_k, v)
    torch.testing.assert_close(mine.attend(q, k, v), expected, rtol=1e-4, atol=1e-5)


def test_performer_pytorchs_random_rotations_are_biased_and_ours_are_not(performer_pytorch):
    # Theirs takes Q of a QR decomposition as it comes. Its first row then always points to the same side.
    from effvit.attention.performer import draw_features

    torch.manual_seed(0)
    theirs = torch.stack([performer_pytorch.gaussian_orthogonal_random_matrix(4, 4)[0, 0] for _ in range(300)])
    mine = torch.stack([draw_features(4, 4)[0, 0] for _ in range(300)])
    assert abs(theirs.sign().mean()) == 1
    assert abs(mine.sign().mean()) < 0.3


def nystrom_pair(heads):
    """Both with landmarks as theirs: segments of all tokens, the class token pooled with the rest."""
    package = pytest.importorskip("nystrom_attention", reason=REASON)
    mine = ours("nystromformer", heads=heads, num_landmarks=4, conv_kernel_size=5, qkv_bias=False)
    mine.landmarks = lambda t: t.unflatten(-2, (4, TOKENS // 4)).mean(dim=-2)
    theirs = package.NystromAttention(
        WIDTH, dim_head=WIDTH // heads, heads=heads, num_landmarks=4, residual_conv_kernel=5
    ).eval()
    theirs.load_state_dict(
        {
            "to_qkv.weight": mine.qkv.weight,
            "to_out.0.weight": mine.proj.weight,
            "to_out.0.bias": mine.proj.bias,
            "res_conv.weight": mine.conv.weight,
        }
    )
    return mine, theirs


def test_nystromformer_is_the_package_nystrom_attention_for_one_sample_and_head(x):
    # Ours pools blocks of patches and keeps the class token apart; theirs zero-pads what m does not divide, and
    # starts its iteration from the maximum over the whole batch. With 4 dividing 16, the same pooling, one head and
    # one sample nothing of that is left.
    mine, theirs = nystrom_pair(heads=1)
    for sample in x.split(1):
        torch.testing.assert_close(mine(sample), theirs(sample), rtol=1e-4, atol=1e-5)


def test_in_nystrom_attention_a_sample_depends_on_its_batch_and_here_not(x):
    mine, theirs = nystrom_pair(heads=3)
    x[1] *= 30
    assert relative_error(theirs(x)[:1], theirs(x[:1])) > 1e-3
    assert relative_error(mine(x)[:1], mine(x[:1])) < 1e-5


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", [name for name in PEERS if name not in ("standard", "fused")])
def test_at_4097_tokens_no_peer_needs_less_memory(name, mode):
    if PEERS[name].package != PLAIN:
        pytest.importorskip(PEERS[name].package.replace("-", "_"), reason=REASON, exc_type=ImportError)
    mine = build_ours(name, 192, 3, (64, 64), **({"num_features": 64} if name == "performer" else {}))
    x = torch.randn(1, mine.num_tokens, 192)
    calls = [MODES[mode](module, x) for module in (mine, PEERS[name].build(mine))]
    for call in calls:
        call()
    needed, theirs = (peak_bytes(call, torch.device("cpu")) for call in calls)
    assert needed <= 1.01 * theirs
