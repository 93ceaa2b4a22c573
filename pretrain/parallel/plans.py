"""How each module is cut over tensor-parallel ranks: plain tables, read by tensor.py.

Kinds:
    column      linear: output features are cut; each rank makes its own heads or channels.
    row         linear: input features are cut; partial results are summed over ranks.
    shard       parameter of the module itself: cut on dim 0 (per head or per channel).
    norm        norm over channels of all heads: its scale is cut, its mean square summed over ranks.
    partial     kept whole, used on a part of the heads or tokens, so its gradient is summed over ranks.
    replicated  kept whole and used whole, alike on every rank, so its gradient needs no sum.
A new mixer adds a table here; a test checks that every parameter of every mixer is covered.
"""

MIXER_PLANS: dict[str, dict[str, str]] = {
    "full": {
        "q_proj": "column",
        "k_proj": "column",
        "v_proj": "column",
        "gate_proj": "column",
        "o_proj": "row",
    },
    "window": {
        "q_proj": "column",
        "k_proj": "column",
        "v_proj": "column",
        "gate_proj": "column",
        "o_proj": "row",
    },
    "gdn": {
        "q_proj": "column",
        "k_proj": "column",
        "v_proj": "column",
        "a_proj": "column",
        "b_proj": "column",
        "g_proj": "column",
        "q_conv": "shard",
        "k_conv": "shard",
        "v_conv": "shard",
        "A_log": "shard",
        "dt_bias": "shard",
        "o_norm": "partial",
        "o_proj": "row",
    },
    "kda": {
        "q_proj": "column",
        "k_proj": "column",
        "v_proj": "column",
        "f_a_proj": "partial",
        "f_b_proj": "column",
        "b_proj": "column",
        "g_a_proj": "partial",
        "g_b_proj": "column",
        "q_conv": "shard",
        "k_conv": "shard",
        "v_conv": "shard",
        "A_log": "shard",
        "dt_bias": "shard",
        "o_norm": "partial",
        "o_proj": "row",
    },
    "deltanet": {
        "q_proj": "column",
        "k_proj": "column",
        "v_proj": "column",
        "b_proj": "column",
        "q_conv": "shard",
        "k_conv": "shard",
        "v_conv": "shard",
        "o_norm": "partial",
        "o_proj": "row",
    },
    "mamba2": {
        "z_proj": "column",
        "x_proj": "column",
        "b_proj": "partial",
        "c_proj": "partial",
        "dt_proj": "column",
        "x_conv": "shard",
        "x_conv_bias": "shard",
        "b_conv": "partial",
        "b_conv_bias": "partial",
        "c_conv": "partial",
        "c_conv_bias": "partial",
        "A_log": "shard",
        "dt_bias": "shard",
        "D": "shard",
        "o_norm": "norm",
        "o_proj": "row",
    },
    "gla": {
        "q_proj": "column",
        "k_proj": "column",
        "v_proj": "column",
        "gk_a_proj": "partial",
        "gk_b_proj": "column",
        "gk_bias": "shard",
        "g_proj": "column",
        "o_norm": "partial",
        "o_proj": "row",
    },
    "hgrn2": {
        "q_proj": "column",
        "f_proj": "column",
        "i_proj": "column",
        "o_norm": "norm",
        "o_proj": "row",
    },
    "retnet": {
        "q_proj": "column",
        "k_proj": "column",
        "v_proj": "column",
        "g_proj": "column",
        "o_norm": "partial",
        "o_proj": "row",
    },
    "nsa": {
        "q_proj": "column",
        "k_proj": "column",
        "v_proj": "column",
        "gate_proj": "column",
        "o_proj": "row",
        "g_proj": "column",
        "k_pool": "shard",
        "v_pool": "shard",
    },
    "dsa": {
        "q_proj": "column",
        "k_proj": "column",
        "v_proj": "column",
        "gate_proj": "column",
        "o_proj": "row",
        "index_q_proj": "replicated",
        "index_k_proj": "replicated",
        "index_w_proj": "replicated",
        "index_k_norm": "replicated",
    },
}

FFN_PLAN: dict[str, str] = {"gate_proj": "column", "up_proj": "column", "down_proj": "row"}

# How kinds lie in storage: dim that is cut; a kind that is absent is kept whole.
CUT_DIMS: dict[str, int] = {"column": 0, "row": 1, "shard": 0, "norm": 0}
