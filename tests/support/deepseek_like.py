"""A layer of somebody else's, as `mlakit study fast-path --baseline deepseek_like:Layer` takes it; for tests only."""

from torch import nn

from mlakit.nn import get_mla


class Layer(nn.Module):
    """DeepSeek's parameter names and forward, and a cache of its own."""

    def __init__(self, args):
        super().__init__()
        ours = get_mla("naive", args)
        for name, module in ours.named_children():
            self.add_module(name, module)
        self._ours = [ours]

    def forward(self, x, start_pos, freqs_cis, mask):
        assert start_pos == 0
        return self._ours[0](x, start_pos, freqs_cis, mask)


class Wrong(Layer):
    """Forgets the mask."""

    def forward(self, x, start_pos, freqs_cis, mask):
        return super().forward(x, start_pos, freqs_cis, None)
