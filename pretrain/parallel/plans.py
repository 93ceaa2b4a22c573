"""How each module is cut over tensor-parallel ranks: plain tables, read by tensor.py.

Kinds of linear:
    column      output features are cut; each rank makes its own heads or channels.
    row         input features are cut; partial results are summed over ranks.
Kinds of parameter:
    shard       cut on dim 0 (per-head or per-channel parameters of the module itself).
    partial     kept whole, used on a part of the heads or tokens, so its gradient is summed over ranks.
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
}

FFN_PLAN: dict[str, str] = {"gate_proj": "column", "up_proj": "column", "down_proj": "row"}
