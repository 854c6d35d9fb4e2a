import torch
from ziphius.kernels.quantize import *
from ziphius.kernels.quantize import Fp8, dequantize, quantize_tiles, turn
class TorchSwigluFp8:
    def forward(self, gate, up, gates, *, power_of_two=False):
        h = torch.nn.functional.silu(gate.float())*up.float()
        if gates is not None: h=h*gates.float()[:,None]
        return quantize_tiles(h,power_of_two=power_of_two), quantize_tiles(gate), quantize_tiles(up)
    def turned(self, gate, up, gates, counts=None, *, power_of_two=False):
        h = torch.nn.functional.silu(dequantize(gate))*dequantize(up)
        if gates is not None: h=h*gates.float()[:,None]
        return turn(h,counts,power_of_two=power_of_two)
    def backward(self, gate, up, gates_M, dh, dgate, dup):
        g,u,dh=dequantize(gate),dequantize(up),dh.float()
        sigmoid = g.sigmoid()
        silu = g * sigmoid
        dgates_M = None
        if gates_M is not None:
            dgates_M = (dh * silu * u).sum(-1)
            dh = dh * gates_M.float().unsqueeze(-1)
        dup.copy_(dh * silu)
        dgate.copy_((dh * u).mul_(silu.addcmul(silu, sigmoid, value=-1).add_(sigmoid)))
        return dgates_M
VERSIONS={"torch":TorchSwigluFp8}
