"""The network, readable with no knowledge of parallelism or serving.

Tensor names end in their shape, in these letters:

    B  sequences                 E  routed experts            C  KV latent width (kv_lora_rank)
    T  tokens of a sequence      K  experts per token         Q  query latent width (q_lora_rank)
    N  B * T flattened tokens    F  expert width              R  rotary width
    D  hidden                    M  rows sorted by expert     V  vocabulary
    H  heads                     S  cached positions

A small letter is a width that only one file knows. ``x_ND`` is ``[N, D]``.
"""
