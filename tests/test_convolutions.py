"""A convolution that PyTorch's backward pass damages memory in, in a process of its own: it ends by a signal."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from freqdoor.training.convolutions import ContiguousConv2d, keep_contiguous

STEP = """
import torch
from freqdoor.codecs.adapter import build_codec
from freqdoor.codecs.architectures import CodecSpec
from freqdoor.training.loop import place, place_codec
from freqdoor.training.settings import Training
settings = Training(images={"folder": "none"}, precision="fp32")
codec = build_codec(CodecSpec(name="small", architecture="cheng2020-anchor", quality=3, arguments={"N": 32}))
place_codec(codec, settings)
for side in (64, 128):
    out = codec(place(torch.rand(2, 3, side, side), settings))
    (out.bpp.mean() + out.x_hat.square().mean()).backward()
print("trained")
"""


@pytest.mark.long
def test_a_codec_with_a_strided_skip_from_the_picture_is_trained_in_fp32():
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", STEP], capture_output=True, text=True, check=False)
    assert done.stdout == "trained\n", (done.returncode, done.stderr[-500:])


def test_only_these_convolutions_change_and_to_the_same_values():
    net = nn.Sequential(nn.Conv2d(3, 16, 1, stride=2), nn.Conv2d(16, 8, 1, stride=2), nn.Conv2d(8, 8, 3, stride=2))
    x = torch.rand(1, 3, 32, 32)
    before, state = net(x), net.state_dict()
    keep_contiguous(net)
    assert [type(module) is ContiguousConv2d for module in net] == [True, False, False]
    assert torch.equal(net(x), before)
    assert net.state_dict().keys() == state.keys()
