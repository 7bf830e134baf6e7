"""Vision transformers (Dosovitskiy et al. 2021, arXiv:2010.11929) in timm's layout.

ViT-S/16 and ViT-B/16: patches of 16x16 pixels, a class token, learned position embeddings, pre-norm
blocks, a last normalisation, and a classifier of the class token. Without BatchNorm; masks go by the
declared order of blocks as in every network:

>>> from seal_jax import masks, models
>>> model = models.create("vit_small_patch16", num_classes=10, image_shape=(224, 224, 3))
>>> masks.before(model.blocks, "block2")
('patch_embed', 'cls_token', 'pos_embed', 'block1')

One thing differs from timm: the patches' kernel is drawn as all others, from N(0, 0.02^2), and their
bias is zero; timm leaves both to torch's default, whose deviation is 0.0208 for patches of 16x16x3.
"""

import functools
import math
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
from flax import linen as nn

from seal_jax.errors import UsageError, check_integer
from seal_jax.models import network as net


@jax.custom_jvp
def _normal_cdf(x: jax.Array) -> jax.Array:
    """Return the probability that a standard normal number is at most ``x``."""
    return 0.5 * jax.lax.erfc(-x * math.sqrt(0.5))


# Its density. JAX 0.12's own derivative of erfc is a polynomial that `shard_map` refuses.
_normal_cdf.defjvps(
    lambda tangent, _, x: tangent * jnp.exp(-0.5 * jnp.square(x)) / math.sqrt(2 * math.pi)
)


class TransformerBlock(net.Layered, kw_only=True):
    """Self-attention and a hidden layer with GELU, each after a normalisation and added to its input.

    Dropout applies after every dense layer but the queries', keys' and values' (appendix B.1).

    Attributes:
        heads: of the attention.
        dropout: rate.
    """

    heads: int
    dropout: float

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Map tokens ``[N, T, C]`` to tokens."""
        drop = nn.Dropout(self.dropout, deterministic=not train)
        width = x.shape[-1]
        y = self._dense(3 * width, "qkv")(self._layer_norm("norm1")(x))
        # [N, T, 3, heads, C / heads], as torch lays the fused layer's outputs out.
        query, key, value = jnp.moveaxis(y.reshape(*y.shape[:2], 3, self.heads, -1), 2, 0)
        y = jax.nn.dot_product_attention(query, key, value)
        x = x + drop(self._dense(width, "proj")(y.reshape(x.shape)))
        y = self._dense(4 * width, "fc1")(self._layer_norm("norm2")(x))
        # GELU: Flax's default is the tanh approximation.
        y = drop(self._hidden(1, y * _normal_cdf(y)))
        return self._finish(x + drop(self._dense(width, "fc2")(y)))

    def _dense(self, width: int, name: str) -> nn.Dense:
        init = net.INITIALISERS[self.initialiser]()
        return nn.Dense(width, dtype=self.dtype, kernel_init=init, name=name)

    def _layer_norm(self, name: str) -> nn.LayerNorm:
        return nn.LayerNorm(epsilon=_EPSILON, dtype=self.dtype, name=name)


_EPSILON = 1e-6


class ViT(net.Network, kw_only=True):
    """A vision transformer.

    The parameter tree is ``patch_embed``, ``cls_token``, ``pos_embed``, ``block1`` upwards, ``norm``
    and ``fc``. A block's output are tokens ``[N, 1 + patches, width]``, the class token first. Dropout
    applies after the position embeddings and within the blocks.

    Attributes:
        patch: side of a patch, which divides that of the images.
        width: channels of a token; a multiple of 64, the width of a head, or smaller: then one head.
        depth: blocks.

    The other fields are those of ``Network`` and ``Layered``; ``norm`` is "layer", here over each
    token's channels, and ``initialiser`` is "normal" by default.
    """

    norm: str = "layer"
    initialiser: str = "normal"
    patch: int = 16
    width: int = 384
    depth: int = 12

    choices: ClassVar[dict[str, Any]] = {"norm": ("layer",)}
    width_fields: ClassVar[tuple[str, ...]] = ("width",)

    def __post_init__(self) -> None:
        """Check the fields."""
        check_integer("patch", self.patch, 1)
        check_integer("depth", self.depth, 1)
        super().__post_init__()
        if self.width > _HEAD_WIDTH and self.width % _HEAD_WIDTH:
            below = self.width // _HEAD_WIDTH * _HEAD_WIDTH
            raise UsageError(
                f"width={self.width!r} does not divide into heads of {_HEAD_WIDTH}: use {below} or "
                f"{below + _HEAD_WIDTH}"
            )

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Return the logits, float32 ``[N, num_classes]``, of images ``[N, H, W, C]``."""
        x = self._conv(self.width, self.patch, "patch_embed", self.patch, padding=0, bias=True)(x)
        x = x.reshape(len(x), -1, self.width)
        token = self.param("cls_token", nn.initializers.normal(1e-6), (1, 1, self.width))
        x = jnp.concatenate([jnp.broadcast_to(token, (len(x), 1, self.width)), x], axis=1)
        # Added in float32, in which both are.
        x = x + self.param("pos_embed", nn.initializers.normal(0.02), (1, *x.shape[1:]))
        x = self._drop(x.astype(self.dtype), train)
        block = self._block(
            TransformerBlock, heads=max(1, self.width // _HEAD_WIDTH), dropout=self.dropout
        )
        for name in self.structure.round_blocks:
            x = block(name=name)(x, train)
        # The class token's normalisation alone: no other token is read.
        x = nn.LayerNorm(epsilon=_EPSILON, dtype=self.dtype, name="norm")(x[:, 0])
        return self._logits(x)

    @property
    def structure(self) -> net.Structure:
        """K blocks of four dense layers; they are the body, so only ``fc`` counts as behind it."""
        blocks = net.numbered("block", self.depth)
        return net.Structure(
            blocks=("patch_embed", "cls_token", "pos_embed", *blocks, "norm", net.HEAD),
            layers=("patch_embed", *net.within(blocks, "qkv", "proj", "fc1", "fc2"), net.HEAD),
            round_blocks=blocks,
            total_stride=self.patch,
            side_multiple=self.patch,
            units=net.inner_units(blocks, ("fc1", "", "fc2")),
        )

    def slim(self, keep: float) -> Self:
        """Raise: leading slices of a fused layer of queries, keys and values are no such layer."""
        raise UsageError(
            "model.name: a ViT has no slim form, which KELS needs; take another network"
        )

    def torch_layers(self) -> dict[str, dict[str, str]]:
        """Return timm's names of the modules, and of the two free parameters, by our paths."""
        names = {
            "patch_embed": "patch_embed.proj",
            "cls_token": "cls_token",
            "pos_embed": "pos_embed",
            "norm": "norm",
            net.HEAD: "head",
        }
        parts = {"qkv": "attn.qkv", "proj": "attn.proj", "fc1": "mlp.fc1", "fc2": "mlp.fc2"}
        for index in range(self.depth):
            for part in ("norm1", "qkv", "proj", "norm2", "fc1", "fc2"):
                names[f"block{index + 1}/{part}"] = f"blocks.{index}.{parts.get(part, part)}"
        return {"timm": names}


# Of a head, in both networks.
_HEAD_WIDTH = 64

MODELS = {
    name: net.Entry(
        functools.partial(ViT, width=width),
        ("patch", "width", "depth"),
        source,
        config="fast_cifar100.py",
    )
    for name, width, source in (
        ("vit_small_patch16", 384, "Touvron et al. 2021"),
        ("vit_base_patch16", 768, "Dosovitskiy et al. 2021"),
    )
}
