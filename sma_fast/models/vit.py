"""MAE: a ViT encoder of the visible patches, and a light decoder that reconstructs the others.

Letters in the shapes: B batch, N patches, V visible, K masked, C encoder width, H heads.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sma_fast import _check, ops
from sma_fast.masking.random import RandomMasking, count_masked
from sma_fast.models import vit_hugging_face, vit_selection
from sma_fast.models.hub import HubModel
from sma_fast.models.vit_config import MAEConfig
from sma_fast.models.vit_layers import MAEDecoder, MAEEncoder, patchify, unpatchify


class MAEOutput(NamedTuple):
    """What `MAEForPretraining` returns.

    Attributes:
        loss: scalar, the mean over all masked patches of the batch; 0 for an empty batch.
        pixels: (B, N, patch size squared times channels), the reconstruction of all patches as
            `patchify` cuts them; with `norm_pix_loss` less each patch's mean, over its deviation.
        mask: (B, N) bool, True = masked.
        ids_restore: (B, N) int64, where patch j stands in ``cat([visible, masked], 1)``.
        ids_masked: (B, K) int64, -1 behind a row's own number.
        patch_loss: (B, N) float32, squared error of each patch, the visible ones too.
    """

    loss: Tensor
    pixels: Tensor
    mask: Tensor
    ids_restore: Tensor
    ids_masked: Tensor
    patch_loss: Tensor


class MAEForPretraining(nn.Module, HubModel):
    """Hides patches of a picture, encodes the rest, reconstructs what was hidden.

    `save_pretrained(folder)` and `from_pretrained(folder or hub name)` are huggingface_hub's;
    `from_hugging_face` and `to_hugging_face` exchange weights with transformers' ViTMAE.

    Args:
        config: MAEConfig.

    Source: Masked Autoencoders Are Scalable Vision Learners (arXiv 2111.06377), section 3.
    """

    main_input_name = "pixels"

    def __init__(self, config: MAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = MAEEncoder(config)
        self.decoder = MAEDecoder(config)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for token in (self.encoder.class_token, self.decoder.mask_token):
            nn.init.normal_(token, std=config.initializer_range)

    def forward(
        self,
        pixels: Tensor,
        mask: Tensor | ops.TokenSelection | None = None,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> MAEOutput:
        """Returns the reconstruction and its loss over masked patches.

        Args:
            pixels: (B, channels, image size, image size), floats.
            mask: what a policy of `sma_fast.masking` returns; or (B, N) bool, True = masked, at
                least one and not all of a row, whose numbers are read (which waits for a GPU; a
                compiled graph encodes N patches with gaps instead). Default: MAE's random mask.
            noise: (B, N) floats that decide the random mask: the lowest are visible.
            generator: for the random mask. Default: torch's global one.

        Returns:
            MAEOutput.

        Raises:
            TypeError, ValueError: naming the argument, what was given and what is allowed.
        """
        patches = self.patchify(pixels)  # (B, N, patch channels)
        count = self.config.num_patches
        if mask is not None and noise is not None:
            raise ValueError("mask, noise: got both, allowed is at most one")
        if mask is not None:
            selection = vit_selection.given(mask, patches)
        elif noise is not None:
            noise = vit_selection.checked_noise(noise, patches)
            number = count_masked(count, self.config.mask_ratio)
            selection = ops.select_tokens(noise, num_masked=number)
        else:
            selection = RandomMasking()(self, pixels, generator=generator)
        visible = self.encoder(patches, selection)  # (B, 1 + V, C)
        output = self.decoder(visible, selection.ids_restore)  # (B, N, patch channels)
        patch_loss = (output.float() - self.targets(patches)).square().mean(dim=2)  # (B, N)
        masked = selection.mask
        loss = torch.where(masked, patch_loss, 0.0).sum() / masked.sum().clamp(min=1)
        return MAEOutput(
            loss, output, masked, selection.ids_restore, selection.ids_masked, patch_loss
        )

    def embeddings(self, pixels: Tensor, layer: int = -1, norm: bool = True) -> Tensor:
        """Returns the embeddings of all patches, nothing masked and the class token left out.

        Args:
            pixels: (B, channels, image size, image size), floats.
            layer: after which block, counted from 0, or from -1 for the last; later ones do not
                run.
            norm: whether through the encoder's last normalisation, after whichever block.

        Returns:
            (B, N, C).

        Raises:
            TypeError, ValueError: naming the argument, what was given and what is allowed.
        """
        depth = self._layer(layer) + 1
        x = self.encoder.through(self.encoder.embed(self.patchify(pixels)), depth=depth)[:, 1:]
        return self.encoder.norm(x) if norm else x

    def attention_of_class_token(self, pixels: Tensor, layer: int = -1) -> Tensor:
        """Returns the attention that the class token pays to each patch, nothing masked.

        No (N, N) map is computed; the rest of a row's sum of 1 is what it pays to itself.

        Args:
            pixels: (B, channels, image size, image size), floats.
            layer: in which block, counted from 0, or from -1 for the last.

        Returns:
            (B, H, N) float32. No gradient.

        Raises:
            TypeError, ValueError: naming the argument, what was given and what is allowed.
        """
        layer = self._layer(layer)
        with torch.no_grad():
            x = self.encoder.through(self.encoder.embed(self.patchify(pixels)), depth=layer)
            query, key = self.encoder.layers[layer].first_query_and_keys(x)
            return ops.attention_scores(query, key, head_reduce="none")[:, :, 1:]

    def patchify(self, pixels: Tensor) -> Tensor:
        """Returns (B, N, patch size squared times channels) of (B, channels, height, width)."""
        size, channels = self.config.image_size, self.config.num_channels
        shape = f"(B, {channels}, {size}, {size})"
        _check.tensor("pixels", pixels, 4, shape, _check.FLOATS)
        if pixels.shape[1:] != (channels, size, size):
            raise ValueError(f"pixels: got shape {tuple(pixels.shape)}, allowed is {shape}")
        return patchify(pixels, self.config.patch_size)

    def targets(self, patches: Tensor) -> Tensor:
        """Returns what `.pixels` should be, (B, N, patch channels) float32, of patches."""
        patches = patches.float()
        if not self.config.norm_pix_loss:
            return patches
        variance, mean = torch.var_mean(patches, dim=2, keepdim=True)
        return (patches - mean) / (variance + 1e-6).sqrt()

    def pictures(self, pixels: Tensor, output: MAEOutput) -> Tensor:
        """Returns pictures with the masked patches as reconstructed, the visible ones as given.

        With `norm_pix_loss` a patch gets its own mean and deviation back, which the model did not
        see.

        Args:
            pixels: (B, channels, image size, image size), that `output` belongs to.
            output: MAEOutput.

        Returns:
            As `pixels`, float32.
        """
        patches, made = self.patchify(pixels).float(), output.pixels.detach().float()
        if self.config.norm_pix_loss:
            variance, mean = torch.var_mean(patches, dim=2, keepdim=True)
            made = made * (variance + 1e-6).sqrt() + mean
        return unpatchify(
            torch.where(output.mask.unsqueeze(2), made, patches), self.config.patch_size
        )

    def num_targets(
        self, pixels: Tensor, mask: Tensor | ops.TokenSelection | None = None
    ) -> Tensor:
        """Returns how many patches of a batch the loss is a mean over, scalar int64.

        Args:
            pixels, mask: as in `forward`.
        """
        if isinstance(mask, ops.TokenSelection):
            return mask.num_masked.sum()
        if mask is not None:
            return mask.sum()
        number = count_masked(self.config.num_patches, self.config.mask_ratio)
        return torch.tensor(pixels.shape[0] * number, device=pixels.device)

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict | None = None):
        """Computes activations again in the backward pass, from now on: less memory, more time."""
        self.encoder.checkpointing = self.decoder.checkpointing = True

    def gradient_checkpointing_disable(self) -> None:
        """Keeps activations, from now on."""
        self.encoder.checkpointing = self.decoder.checkpointing = False

    @classmethod
    def from_hugging_face(
        cls, model_or_state_dict: Any, config: MAEConfig | Any | None = None
    ) -> "MAEForPretraining":
        """Returns the model of transformers' weights.

        Args:
            model_or_state_dict: transformers' ViTMAEForPreTraining, or its weights by name, named
                as in transformers 5 or as before, as in the published checkpoints.
            config: MAEConfig, ViTMAEConfig, or a mapping of its fields. Default: the model's.

        Returns:
            MAEForPretraining.

        Raises:
            TypeError, ValueError: for settings that this model does not have, and for weights that
                are unknown, missing or of another shape.
        """
        weights = model_or_state_dict
        if isinstance(weights, nn.Module):
            config = weights.config if config is None else config
            weights = weights.state_dict()
        if config is None:
            raise TypeError("config: got None, allowed is a MAEConfig beside a state dict")
        if not isinstance(config, MAEConfig):
            config = MAEConfig.from_hugging_face(config)
        model = cls(config)
        model.load_state_dict(vit_hugging_face.ours(weights, model.state_dict()))
        return model

    def to_hugging_face(self) -> Any:
        """Returns transformers' ViTMAEForPreTraining with a copy of these weights.

        Raises:
            ImportError: where transformers is not installed.
        """
        return vit_hugging_face.theirs(self.config, self.state_dict())

    def _layer(self, layer: int) -> int:
        depth = self.config.num_hidden_layers
        _check.layer(layer, depth)
        return layer % depth
