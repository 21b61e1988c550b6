"""OverLoCK written down plainly from its authors' code, and what its tests share."""
import torch
import torch.nn.functional as F
from torch import Tensor, nn

LIGHT = dict(depths=[1, 1, 1, 1], focus_depths=[2, 2], channels=[8, 16, 32, 32], kernel_sizes=[7, 7, 7, 7],
             groups=[2, 2])
# Of the authors' code: kernel size and dilation of the branches.
BRANCHES = {7: '5_1 3_1 3_2 3_3', 13: '5_1 7_1 7_2 3_3 3_4 3_5', 15: '5_1 7_1 7_2 3_3 3_5 3_7',
            17: '5_1 7_1 9_2 3_4 3_5 3_7'}


def randomised(model: nn.Module) -> nn.Module:
    """Draws everything that starts as a constant: scales, biases, and the statistics of BatchNorm."""
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            value.copy_(torch.rand_like(value) + 0.5 if name.endswith('running_var') else 0.3 * torch.randn_like(value))
    return model


class Plain:
    """The authors' forward pass in evaluation mode, from their weights, one position of ContMix at a time."""

    def __init__(self, state: dict[str, Tensor], kernel_sizes: list[int], heads: list[int]) -> None:
        self.state, self.kernel_sizes, self.heads = state, kernel_sizes, heads

    def conv(self, x: Tensor, name: str, stride: int = 1, dilation: int = 1) -> Tensor:
        weight = self.state[f'{name}.weight']
        return F.conv2d(x, weight, self.state.get(f'{name}.bias'), stride, dilation * (weight.size(-1) // 2), dilation,
                        groups=x.size(1) // weight.size(1))

    def bn(self, x: Tensor, name: str) -> Tensor:
        mean, var, weight, bias = (
            self.state[f'{name}.{key}'].view(-1, 1, 1) for key in ('running_mean', 'running_var', 'weight', 'bias'))
        return (x - mean) / (var + 1e-5).sqrt() * weight + bias

    def conv_bn(self, x: Tensor, name: str, first: int = 0, stride: int = 1) -> Tensor:
        return self.bn(self.conv(x, f'{name}.{first}', stride), f'{name}.{first + 1}')

    def ln(self, x: Tensor, name: str) -> Tensor:
        x = (x - x.mean(1, keepdim=True)) / (x.var(1, unbiased=False, keepdim=True) + 1e-6).sqrt()
        return x * self.state[f'{name}.weight'].view(-1, 1, 1) + self.state[f'{name}.bias'].view(-1, 1, 1)

    def scale(self, x: Tensor, name: str) -> Tensor:
        return x * self.state[f'{name}.weight'].view(-1, 1, 1) + self.state[f'{name}.bias'].view(-1, 1, 1)

    def grn(self, x: Tensor, name: str) -> Tensor:
        response = x.square().sum((2, 3), keepdim=True).sqrt()
        relative = response / (response.mean(1, keepdim=True) + 1e-6)
        return (self.state[f'{name}.gamma'] * relative + 1) * x + self.state[f'{name}.beta']

    def squeeze(self, x: Tensor, name: str) -> Tensor:
        hidden = F.gelu(self.conv(x.mean((2, 3), keepdim=True), f'{name}.proj.1'))
        return x * self.conv(hidden, f'{name}.proj.3').sigmoid()

    def residual(self, x: Tensor, name: str) -> Tensor:
        return x + self.conv(x, name)

    def ffn(self, x: Tensor, name: str, first: int) -> Tensor:
        x = self.residual(F.gelu(self.conv(x, f'{name}.{first}')), f'{name}.{first + 2}')
        return self.conv(self.grn(x, f'{name}.{first + 3}'), f'{name}.{first + 4}')

    def dilated(self, x: Tensor, name: str, kernel_size: int) -> Tensor:
        out = self.bn(self.conv(x, f'{name}.lk_origin'), f'{name}.origin_bn')
        for branch in BRANCHES[kernel_size].split():
            out = out + self.bn(self.conv(x, f'{name}.dil_conv_k{branch}', dilation=int(branch[2])),
                                f'{name}.dil_bn_k{branch}')
        return out

    def base_block(self, x: Tensor, name: str, kernel_size: int) -> Tensor:
        x = self.residual(x, f'{name}.dwconv')
        y = self.bn(self.dilated(self.ln(x, f'{name}.proj.0'), f'{name}.proj.1', kernel_size), f'{name}.proj.2')
        y = self.ffn(self.squeeze(y, f'{name}.proj.3'), f'{name}.proj', 4)
        return (self.scale(x, f'{name}.ls') if f'{name}.ls.weight' in self.state else x) + y

    def mix(self, x: Tensor, fused: Tensor, name: str, kernel_size: int, heads: int) -> Tensor:
        n, channels, *size = x.shape
        if min(size) < kernel_size:
            ratio = kernel_size / min(size)
            larger = [kernel_size if side == min(size) else int(ratio * side) for side in size]
            x, fused = (F.interpolate(maps, larger, mode='bilinear', align_corners=False) for maps in (x, fused))
        height, width = x.shape[2:]
        query = self.conv_bn(fused[:, :channels], f'{name}.weight_query') * (channels // heads) ** -0.5
        pooled = F.adaptive_avg_pool2d(fused[:, channels:], 7)
        key = self.conv_bn(pooled, f'{name}.weight_key', first=1)
        weight, bias = self.state[f'{name}.weight_proj.weight'].flatten(1), self.state[f'{name}.weight_proj.bias']
        out = torch.zeros_like(x)
        width_of_key, width_of_value = channels // 2 // heads, channels // 2 // heads
        for head in range(heads):
            part = slice(head * width_of_key, (head + 1) * width_of_key)
            for h in range(height):
                for w in range(width):
                    affinity = torch.einsum('nc,ncs->ns', query[:, part, h, w], key[:, part].flatten(2))
                    logits = affinity @ weight.T + bias  # (N, 25 + K²)
                    for half, (k, own, table) in enumerate((
                            (5, logits[:, :25], 'rpb1'), (kernel_size, logits[:, 25:], 'rpb2'))):
                        top, left = min(max(h - k // 2, 0), height - k), min(max(w - k // 2, 0), width - k)
                        offset = self.state[f'{name}.{table}'][
                            head, top - h + k - 1:top - h + 2 * k - 1, left - w + k - 1:left - w + 2 * k - 1]
                        kernel = (own + offset.flatten()).softmax(1).view(n, 1, k, k)
                        start = half * channels // 2 + head * width_of_value
                        value = x[:, start:start + width_of_value, top:top + k, left:left + k]
                        out[:, start:start + width_of_value, h, w] = (kernel * value).sum((2, 3))
        return F.adaptive_avg_pool2d(out, size)

    def focus_block(self, x: Tensor, context: Tensor, initial: Tensor, name: str, kernel_size: int, heads: int
                    ) -> tuple[Tensor, Tensor]:
        channels = x.size(1)
        if f'{name}.x_scale.weight' in self.state:
            context = self.scale(context, f'{name}.x_scale') + self.scale(initial, f'{name}.h_scale')
        identity = self.residual(torch.cat((x, context), 1), f'{name}.dwconv1')
        fused = self.ln(identity, f'{name}.norm1')
        x = self.conv(F.gelu(self.bn(self.conv(fused, f'{name}.fusion.0'), f'{name}.fusion.1')), f'{name}.fusion.3')
        x = self.grn(x, f'{name}.fusion.4')
        gate = F.silu(self.conv_bn(x, f'{name}.gate'))
        static = self.bn(self.dilated(x, f'{name}.lepe.0', kernel_size), f'{name}.lepe.1')
        mixed = self.conv_bn(self.mix(x, fused, name, kernel_size, heads), f'{name}.dyconv_proj') + static
        mixed = gate * self.squeeze(mixed, f'{name}.se_layer')
        mixed = self.conv(self.bn(mixed, f'{name}.proj.0'), f'{name}.proj.1')
        x = self.residual(self.scale(identity, f'{name}.ls1') + mixed, f'{name}.dwconv2')
        x = self.scale(x, f'{name}.ls2') + self.ffn(self.ln(x, f'{name}.norm2'), f'{name}.mlp', 0)
        return x[:, :channels], x[:, channels:]

    def blocks(self, prefix: str) -> list[str]:
        """Names of the blocks of a list."""
        return sorted({'.'.join(name.split('.')[:2]) for name in self.state if name.startswith(f'{prefix}.')})

    def __call__(self, x: Tensor) -> list[Tensor]:
        for first, stride in ((0, 2), (3, 1), (6, 2)):
            x = F.gelu(self.conv_bn(x, 'patch_embed1', first, stride))
        x = self.conv_bn(x, 'patch_embed1', 9)
        outs = []
        for stage in (1, 2, 3, 4):
            if stage > 1:
                x = self.conv_bn(x, f'patch_embed{stage}', stride=2)
            for name in self.blocks(f'blocks{stage}'):
                x = self.base_block(x, name, self.kernel_sizes[stage - 1])
            outs.append(x)
        x, overview = outs[2:]
        prior = self.conv(overview, 'high_level_proj')
        initial = context = F.interpolate(prior, x.shape[2:], mode='bilinear', align_corners=False)
        for name in self.blocks('sub_blocks3'):
            x, context = self.focus_block(x, context, initial, name, self.kernel_sizes[2], self.heads[0])
        outs[2] = torch.cat((x, context), 1)
        x = self.conv_bn(x, 'patch_embedx.x_proj', stride=2)
        context = self.conv_bn(context, 'patch_embedx.h_proj', stride=2)
        for name in self.blocks('sub_blocks4'):
            x, context = self.focus_block(x, context, prior, name, self.kernel_sizes[3], self.heads[1])
        outs[3] = torch.cat((x, context), 1)
        if 'extra_norm.0.weight' not in self.state:
            return [overview, outs[3]]
        outs = [self.ln(x, f'extra_norm.{i}') for i, x in enumerate(outs)]
        if 'h_proj.0.weight' in self.state:
            outs[3] = outs[3] + self.scale(self.conv(self.ln(overview, 'extra_norm.4'), 'h_proj.0'), 'h_proj.1')
        return outs
