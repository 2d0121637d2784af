"""Convolutions whose backward pass PyTorch gets wrong in the memory layout that training has."""

from torch import Tensor, nn

PACKED = 16  # channels that oneDNN computes together


class ContiguousConv2d(nn.Conv2d):
    """The same convolution, computed from an image and weights that are not channels-last.

    In fp32 on a CPU, PyTorch 2.14's backward pass of a strided 1x1 convolution writes beyond its memory where either is
    channels-last and the input has another number of channels than a multiple of 16: the first skip connection of
    cheng2020-anchor, from the picture itself.
    """

    def forward(self, input: Tensor) -> Tensor:
        """(b, c, h, w) -> (b, m, h / stride, w / stride)."""
        weight = self.weight.flatten(1)[..., None, None]  # `contiguous` leaves a 1x1 kernel's strides as they are
        y: Tensor = self._conv_forward(input.contiguous(), weight, self.bias)
        return y


def keep_contiguous(net: nn.Module) -> None:
    """Let every such convolution of a network that is to be trained be a `ContiguousConv2d`: its state is the same."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d) and type(module) is nn.Conv2d:  # no subclass, which may compute something else
            strided = module.kernel_size == (1, 1) and module.stride != (1, 1)
            if strided and module.in_channels % PACKED:
                module.__class__ = ContiguousConv2d
