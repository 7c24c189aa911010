"""The attention that training uses computes what upstream's does."""

import copy

import torch

from training.attention import use_fusible_attention
from training.train_denoiser import make_transformer


def test_it_gives_upstreams_velocities_and_gradients() -> None:
    torch.manual_seed(0)
    upstream = make_transformer()
    for final in upstream.all_final_layer.values():
        torch.nn.init.normal_(final.linear.weight, std=0.1)
    ours = copy.deepcopy(upstream)
    use_fusible_attention(ours)
    latents = torch.randn(2, 8, 4, 8, 8)
    texts = [torch.randn(7, 128), torch.randn(45, 128)]  # so that one of them is padded
    outputs, gradients = [], []
    for transformer in (upstream, ours):
        output = transformer(
            list(latents.unbind()),
            torch.tensor([0.2, 0.7]),
            texts,
            patch_size=2,
            f_patch_size=2,
            return_dict=False,
        )[0]
        outputs.append(torch.stack(output))
        outputs[-1].square().mean().backward()
        gradients.append(transformer.layers[0].attention.to_q.weight.grad)
    assert outputs[0].abs().max() > 0.1
    torch.testing.assert_close(outputs[1], outputs[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-5, rtol=1e-3)
