"""The text backbones of KerasHub at the smallest size."""

from keras_hub import models

VOCABULARY = {"vocabulary_size": 50}
BLOCKS = {
    "num_layers": 2,
    "num_heads": 2,
    "hidden_dim": 8,
    "intermediate_dim": 16,
}
ENCODER = {**VOCABULARY, **BLOCKS, "dropout": 0.0}
DECODER = {
    **VOCABULARY,
    "num_layers": 2,
    "num_query_heads": 2,
    "num_key_value_heads": 1,
    "hidden_dim": 8,
    "intermediate_dim": 16,
}
EXPERTS = {"num_experts": 3, "top_k": 2}
T5GEMMA = {
    **VOCABULARY,
    **{
        f"{side}_{name}": value
        for side in ("encoder", "decoder")
        for name, value in {
            "hidden_dim": 8,
            "intermediate_dim": 16,
            "num_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 4,
            "layer_types": ["sliding_attention", "full_attention"],
        }.items()
    },
    "sliding_window": 4,
}

BACKBONES = {
    "AlbertBackbone": lambda: models.AlbertBackbone(**ENCODER, embedding_dim=4),
    "BartBackbone": lambda: models.BartBackbone(**ENCODER),
    "BertBackbone": lambda: models.BertBackbone(**ENCODER),
    "BloomBackbone": lambda: models.BloomBackbone(**ENCODER),
    "DebertaV3Backbone": lambda: models.DebertaV3Backbone(
        **ENCODER, bucket_size=8
    ),
    "DistilBertBackbone": lambda: models.DistilBertBackbone(**ENCODER),
    "ESMBackbone": lambda: models.ESMBackbone(**ENCODER),
    "EdRecBackbone": lambda: models.EdRecBackbone(
        vocab_size=50,
        num_layers_enc=2,
        num_layers_dec=2,
        num_heads=2,
        hidden_dim=8,
        intermediate_dim=16,
    ),
    "ElectraBackbone": lambda: models.ElectraBackbone(
        vocab_size=50, **BLOCKS, embedding_dim=8, dropout=0.0
    ),
    "FNetBackbone": lambda: models.FNetBackbone(
        vocabulary_size=50,
        num_layers=2,
        hidden_dim=8,
        intermediate_dim=16,
        dropout=0.0,
    ),
    "FalconBackbone": lambda: models.FalconBackbone(
        vocabulary_size=50,
        num_layers=2,
        num_attention_heads=2,
        hidden_dim=8,
        intermediate_dim=16,
    ),
    "GPT2Backbone": lambda: models.GPT2Backbone(**ENCODER),
    "GPTNeoXBackbone": lambda: models.GPTNeoXBackbone(
        **ENCODER, rotary_percentage=0.5
    ),
    "GemmaBackbone": lambda: models.GemmaBackbone(**DECODER, head_dim=4),
    "GptOssBackbone": lambda: models.GptOssBackbone(**DECODER, **EXPERTS),
    "Llama3Backbone": lambda: models.Llama3Backbone(**DECODER),
    "LlamaBackbone": lambda: models.LlamaBackbone(**DECODER),
    "MistralBackbone": lambda: models.MistralBackbone(**DECODER),
    "MixtralBackbone": lambda: models.MixtralBackbone(**DECODER, **EXPERTS),
    "OPTBackbone": lambda: models.OPTBackbone(**ENCODER),
    "Phi3Backbone": lambda: models.Phi3Backbone(**DECODER),
    "QwenBackbone": lambda: models.QwenBackbone(**DECODER),
    "Qwen3Backbone": lambda: models.Qwen3Backbone(**DECODER, head_dim=4),
    "Qwen3MoeBackbone": lambda: models.Qwen3MoeBackbone(
        **DECODER, **EXPERTS, head_dim=4, moe_intermediate_dim=8
    ),
    "QwenMoeBackbone": lambda: models.QwenMoeBackbone(
        **DECODER,
        **EXPERTS,
        moe_intermediate_dim=8,
        shared_expert_intermediate_dim=8,
    ),
    "RWKV7Backbone": lambda: models.RWKV7Backbone(
        hidden_size=8,
        head_size=4,
        num_layers=2,
        vocabulary_size=50,
        intermediate_dim=16,
        gate_lora=4,
        mv_lora=4,
        aaa_lora=4,
        decay_lora=4,
    ),
    "RobertaBackbone": lambda: models.RobertaBackbone(**ENCODER),
    "RoformerV2Backbone": lambda: models.RoformerV2Backbone(
        **ENCODER, head_size=4
    ),
    "SmolLM3Backbone": lambda: models.SmolLM3Backbone(
        vocabulary_size=50,
        hidden_dim=8,
        intermediate_dim=16,
        num_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        attention_bias=False,
        attention_dropout=0.0,
        rope_layer_enabled_list=[True, False],
        layer_types=["full_attention"] * 2,
        mlp_bias=False,
        layer_norm_epsilon=1e-6,
        max_position_embeddings=32,
        rope_theta=10000.0,
        partial_rotary_factor=1.0,
    ),
    "T5Backbone": lambda: models.T5Backbone(**ENCODER),
    "T5GemmaBackbone": lambda: models.T5GemmaBackbone(**T5GEMMA),
    "XLMRobertaBackbone": lambda: models.XLMRobertaBackbone(**ENCODER),
    "XLNetBackbone": lambda: models.XLNetBackbone(**ENCODER),
}
