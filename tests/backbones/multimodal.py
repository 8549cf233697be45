"""KerasHub's backbones of images, speech and text at the smallest size."""

import numpy as np
from keras_hub import models
from keras_hub.src.models.qwen3_5.qwen3_5_vision_encoder import (
    Qwen3_5VisionEncoder,
)
from keras_hub.src.models.stable_diffusion_3.t5_encoder import T5Encoder
from keras_hub.src.models.vae.vae_backbone import VAEBackbone

VOCABULARY_SIZE = 50
IMAGE_SIZE = 16
IMAGE_SHAPE = (IMAGE_SIZE, IMAGE_SIZE, 3)
PATCH_SIZE = 4
NUM_PATCHES = (IMAGE_SIZE // PATCH_SIZE) ** 2
NUM_MELS = 8

# Of decoders that put images and audio in place of some tokens.
SEQUENCE_LENGTH = 12
IMAGE_POSITIONS = np.arange(1, 5)
AUDIO_POSITIONS = np.arange(5, 9)
IMAGE_TOKEN_ID = 41
AUDIO_TOKEN_ID = 46

ENCODER = {
    "num_layers": 2,
    "num_heads": 2,
    "hidden_dim": 8,
    "intermediate_dim": 16,
}
TEXT_ENCODER = {
    "vocabulary_size": VOCABULARY_SIZE,
    "embedding_dim": 8,
    "max_sequence_length": SEQUENCE_LENGTH,
    **ENCODER,
}
VISION_ENCODER = {
    "image_shape": IMAGE_SHAPE,
    "patch_size": PATCH_SIZE,
    **ENCODER,
}
# The images become `len(IMAGE_POSITIONS)` tokens.
POOLED_VISION_ENCODER = {
    "image_size": IMAGE_SIZE,
    "patch_size": PATCH_SIZE,
    "pool_size": 2,
    "output_dim": 8,
    **ENCODER,
}
DECODER = {
    "vocabulary_size": VOCABULARY_SIZE,
    "num_layers": 2,
    "num_query_heads": 2,
    "num_key_value_heads": 1,
    "hidden_dim": 8,
}
GEMMA = {
    "image_size": IMAGE_SIZE,
    "intermediate_dim": 16,
    "head_dim": 4,
    **DECODER,
}
QWEN = {
    # A quarter of the head turns, and that must be an even number.
    "head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 4,
    "linear_value_head_dim": 4,
    **DECODER,
}
LAYER_TYPES = ["sliding_attention", "full_attention"]
AUDIO_ENCODER = {
    "input_feat_size": NUM_MELS,
    "hidden_size": 8,
    "conv_kernel_size": 3,
    "residual_weight": 0.5,
    "gradient_clipping": 1e10,
    "reduction_factor": 1,
}


def make_blip2():
    num_query_tokens = 4
    return models.BLIP2Backbone(
        vision_encoder=models.BLIP2VisionEncoder(
            image_size=IMAGE_SIZE,
            patch_size=PATCH_SIZE,
            use_patch_bias=True,
            use_class_token=True,
            use_mha_bias=True,
            use_mlp_bias=True,
            dropout_rate=0.0,
            layer_norm_epsilon=1e-6,
            initializer_range=0.02,
            **ENCODER,
        ),
        qformer=models.BLIP2QFormer(
            num_query_tokens=num_query_tokens,
            vision_dim=8,
            cross_attention_frequency=2,
            dropout=0.0,
            layer_norm_epsilon=1e-12,
            **ENCODER,
        ),
        language_model=models.BLIP2CustomOPT(
            vocabulary_size=VOCABULARY_SIZE,
            num_query_tokens=num_query_tokens,
            qformer_hidden_dim=8,
            dropout=0.0,
            max_sequence_length=32,
            **ENCODER,
        ),
    )


def make_gemma3():
    return models.Gemma3Backbone(
        vision_encoder=models.Gemma3VisionEncoder(**POOLED_VISION_ENCODER),
        **GEMMA,
    )


def make_gemma3n():
    # A convolution, then attention over 2 x 2 = 4 positions.
    stages = {
        "block_types": ["er", "mqa"],
        "num_filters": [8, 8],
        "strides": [2, 1],
        "act_layers": ["gelu"] * 2,
        "exp_ratios": [1.0] * 2,
        "se_ratios": [0.0] * 2,
        "dw_kernel_sizes": [3] * 2,
        "dw_start_kernel_sizes": [0] * 2,
        "dw_end_kernel_sizes": [0] * 2,
        "exp_kernel_sizes": [3] * 2,
        "pw_kernel_sizes": [1] * 2,
        "num_heads": [2] * 2,
        "key_dims": [4] * 2,
        "value_dims": [4] * 2,
        "kv_strides": [1] * 2,
        "use_cpe": [False] * 2,
    }
    return models.Gemma3nBackbone(
        # The tokens of images and of audio end the vocabulary.
        text_vocab_size=VOCABULARY_SIZE,
        vocab_size_per_layer_input=40,
        vision_vocab_offset=40,
        vision_vocab_size=5,
        image_token_id=IMAGE_TOKEN_ID,
        audio_vocab_offset=45,
        audio_vocab_size=5,
        audio_token_id=AUDIO_TOKEN_ID,
        pad_token_id=0,
        text_hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
        intermediate_size=[16, 16],
        hidden_activation="gelu_approximate",
        layer_types=LAYER_TYPES,
        sliding_window=4,
        rope_theta=1e6,
        max_position_embeddings=32,
        hidden_size_per_layer_input=4,
        altup_num_inputs=2,
        laurel_rank=2,
        vision_encoder_config={
            "stackwise_num_blocks": [2],
            **{
                f"stackwise_{name}": [values] for name, values in stages.items()
            },
            "stem_size": 8,
            "num_features": 8,
            "use_msfa": False,
            "image_shape": (8, 8, 3),
        },
        vision_hidden_size=8,
        vision_soft_tokens_per_image=len(IMAGE_POSITIONS),
        audio_encoder_config={
            "sscp_conv_channel_size": [4, 4],
            "sscp_conv_kernel_size": [(3, 3), (3, 3)],
            "sscp_conv_stride_size": [(2, 2), (2, 2)],
            "sscp_conv_group_norm_eps": 1e-3,
            "num_hidden_layers": 2,
            "rms_norm_eps": 1e-6,
            "num_attention_heads": 2,
            "attention_chunk_size": 4,
            "attention_logit_cap": 50.0,
            "num_attention_context_left": 5,
            "num_attention_context_right": 0,
            **AUDIO_ENCODER,
        },
        audio_hidden_size=8,
        audio_soft_tokens_per_image=len(AUDIO_POSITIONS),
    )


def make_gemma4():
    return models.Gemma4Backbone(
        vision_encoder=models.Gemma4VisionEncoder(
            head_dim=4, position_embedding_size=16, **POOLED_VISION_ENCODER
        ),
        audio_encoder=models.Gemma4AudioEncoder(
            num_heads=2,
            num_layers=2,
            chunk_size=4,
            context_left=5,
            sscp_conv_channels=(4, 4),
            output_proj_dims=8,
            output_dim=8,
            **AUDIO_ENCODER,
        ),
        num_audio_tokens_per_clip=len(AUDIO_POSITIONS),
        layer_types=LAYER_TYPES,
        hidden_size_per_layer_input=4,
        vocab_size_per_layer_input=VOCABULARY_SIZE,
        **GEMMA,
    )


def make_qwen_vision_encoder():
    return Qwen3_5VisionEncoder(
        depth=2,
        hidden_size=8,
        num_heads=2,
        intermediate_size=16,
        patch_size=PATCH_SIZE,
        num_position_embeddings=16,
    )


def make_t5gemma2():
    stack = {
        "hidden_dim": 8,
        "intermediate_dim": 16,
        "num_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 4,
        "layer_types": LAYER_TYPES,
    }
    return models.T5Gemma2Backbone(
        vocabulary_size=VOCABULARY_SIZE,
        sliding_window=4,
        vision_encoder=models.Gemma3VisionEncoder(**POOLED_VISION_ENCODER),
        eoi_token_index=VOCABULARY_SIZE - 1,
        **{f"encoder_{name}": value for name, value in stack.items()},
        **{f"decoder_{name}": value for name, value in stack.items()},
    )


def make_t5_encoder():
    # Wide enough for both other encoders side by side.
    sizes = {**ENCODER, "hidden_dim": 16}
    return T5Encoder(VOCABULARY_SIZE, dropout=0.0, name="t5", **sizes)


def make_stable_diffusion_3():
    num_filters, num_blocks = [32] * 4, [1] * 4  # in groups of 32
    return models.StableDiffusion3Backbone(
        mmdit_patch_size=2,
        mmdit_hidden_dim=8,
        mmdit_num_layers=2,
        mmdit_num_heads=2,
        mmdit_position_size=4,
        mmdit_qk_norm="rms_norm",
        mmdit_dual_attention_indices=(0,),
        vae=VAEBackbone(
            num_filters, num_blocks, num_filters, num_blocks, sample_channels=8
        ),
        clip_l=models.CLIPTextEncoder(
            intermediate_output_index=-2, name="clip_l", **TEXT_ENCODER
        ),
        clip_g=models.CLIPTextEncoder(
            intermediate_output_index=-2, name="clip_g", **TEXT_ENCODER
        ),
        t5=make_t5_encoder(),
        latent_channels=4,
        image_shape=(32, 32, 3),
    )


def make_flux():
    return models.FluxBackbone(
        input_channels=4,
        hidden_size=8,
        mlp_ratio=2.0,
        num_heads=2,
        depth=2,
        depth_single_blocks=2,
        axes_dim=[2, 2],
        theta=10_000,
        use_bias=True,
        guidance_embed=True,
        image_shape=(4, 4),
        text_shape=(6, 8),
        image_ids_shape=(4, 2),
        text_ids_shape=(6, 2),
        y_shape=(8,),
    )


BACKBONES = {
    "BLIP2Backbone": make_blip2,
    "CLIPBackbone": lambda: models.CLIPBackbone(
        models.CLIPVisionEncoder(**VISION_ENCODER),
        models.CLIPTextEncoder(**TEXT_ENCODER),
        projection_dim=8,
    ),
    "CLIPTextEncoder": lambda: models.CLIPTextEncoder(**TEXT_ENCODER),
    "CLIPVisionEncoder": lambda: models.CLIPVisionEncoder(**VISION_ENCODER),
    "MetaCLIP2Backbone": lambda: models.MetaCLIP2Backbone(
        models.MetaCLIP2VisionEncoder(**VISION_ENCODER),
        models.MetaCLIP2TextEncoder(**TEXT_ENCODER),
        projection_dim=8,
    ),
    "MetaCLIP2TextEncoder": lambda: models.MetaCLIP2TextEncoder(**TEXT_ENCODER),
    "MetaCLIP2VisionEncoder": lambda: models.MetaCLIP2VisionEncoder(
        **VISION_ENCODER
    ),
    "SigLIPBackbone": lambda: models.SigLIPBackbone(
        models.SigLIPVisionEncoder(**VISION_ENCODER),
        models.SigLIPTextEncoder(**TEXT_ENCODER),
    ),
    "SigLIPTextEncoder": lambda: models.SigLIPTextEncoder(**TEXT_ENCODER),
    "SigLIPVisionEncoder": lambda: models.SigLIPVisionEncoder(**VISION_ENCODER),
    "PaliGemmaBackbone": lambda: models.PaliGemmaBackbone(
        vit_patch_size=PATCH_SIZE,
        **{f"vit_{name}": value for name, value in ENCODER.items()},
        **GEMMA,
    ),
    "Gemma3Backbone": make_gemma3,
    "Gemma3nBackbone": make_gemma3n,
    "Gemma4Backbone": make_gemma4,
    "Qwen3_5Backbone": lambda: models.Qwen3_5Backbone(
        intermediate_dim=16, vision_encoder=make_qwen_vision_encoder(), **QWEN
    ),
    "Qwen3_5MoeBackbone": lambda: models.Qwen3_5MoeBackbone(
        moe_intermediate_dim=8,
        shared_expert_intermediate_size=8,
        num_experts=4,
        top_k=2,
        vision_encoder=make_qwen_vision_encoder(),
        **QWEN,
    ),
    "T5Gemma2Backbone": make_t5gemma2,
    "WhisperBackbone": lambda: models.WhisperBackbone(
        vocabulary_size=VOCABULARY_SIZE,
        num_mels=NUM_MELS,
        max_encoder_sequence_length=32,
        max_decoder_sequence_length=16,
        **ENCODER,
    ),
    "MoonshineBackbone": lambda: models.MoonshineBackbone(
        vocabulary_size=VOCABULARY_SIZE,
        filter_dim=8,
        encoder_num_layers=2,
        decoder_num_layers=2,
        hidden_dim=8,
        intermediate_dim=16,
        encoder_num_heads=2,
        decoder_num_heads=2,
    ),
    "StableDiffusion3Backbone": make_stable_diffusion_3,
    "FluxBackbone": make_flux,
}

# What one example of an input is, where its name and dtype do not say it all:
# its shape, its values, or a function that makes them from its number.
IMAGES_IN_TEXT = {
    "images": (1, *IMAGE_SHAPE),
    "vision_indices": IMAGE_POSITIONS,
    "vision_mask": np.isin(np.arange(SEQUENCE_LENGTH), IMAGE_POSITIONS),
}
QWEN_IMAGES = {
    "pixel_values": (NUM_PATCHES, 2, PATCH_SIZE, PATCH_SIZE, 3),
    "image_grid_thw": [[1, 4, 4]],
    # Positions in the batch, one example after the other.
    "vision_indices": lambda i: IMAGE_POSITIONS + i * SEQUENCE_LENGTH,
}
INPUTS = {
    "Gemma3Backbone": IMAGES_IN_TEXT,
    "Gemma3nBackbone": {
        "token_ids": [1, *[IMAGE_TOKEN_ID] * 4, *[AUDIO_TOKEN_ID] * 4, 2, 3, 4],
        "images": (1, 8, 8, 3),
        "input_features": (1, 16, NUM_MELS),
        # Here a mask is where there is no sound.
        "input_features_mask": np.zeros((1, 16)),
    },
    "Gemma4Backbone": {
        **IMAGES_IN_TEXT,
        "position_ids": np.arange(SEQUENCE_LENGTH),
        "pixel_values": (1, NUM_PATCHES, 3 * PATCH_SIZE**2),
        "pixel_position_ids": [[(x, y) for y in range(4) for x in range(4)]],
        "audio_indices": AUDIO_POSITIONS,
        "audio_mask": np.isin(np.arange(SEQUENCE_LENGTH), AUDIO_POSITIONS),
        "audio_mel": (1, 16, NUM_MELS),
        "audio_mel_mask": (1, 16),
    },
    "Qwen3_5Backbone": QWEN_IMAGES,
    "Qwen3_5MoeBackbone": QWEN_IMAGES,
    "T5Gemma2Backbone": IMAGES_IN_TEXT,
    "MoonshineBackbone": {
        # Its convolutions leave 4 positions of these, and 2 without padding.
        "encoder_input_values": (2048, 1),
        "encoder_padding_mask": (2048,),
    },
    "StableDiffusion3Backbone": {"num_steps": 4, "guidance_scale": 5.0},
}
