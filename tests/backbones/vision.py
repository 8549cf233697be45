"""The vision backbones of KerasHub at the smallest size."""

import numpy as np
from keras_hub import layers
from keras_hub import models

VOCABULARY_SIZE = 50

IMAGE = {"image_shape": (16, 16, 3)}
ATTENTION = {"num_layers": 2, "num_heads": 2, "hidden_dim": 8}
TRANSFORMER = {**ATTENTION, "intermediate_dim": 16}
VIT = {**IMAGE, **ATTENTION, "patch_size": 8, "mlp_dim": 16}
DINO = {**IMAGE, **TRANSFORMER, "patch_size": 8, "num_register_tokens": 2}
DINOV2 = {**DINO, "position_embedding_shape": (16, 16, 3)}

# `ResNetBackbone` wants 64 filters in the first stack.
RESNET = {
    "input_conv_filters": [8],
    "input_conv_kernel_sizes": [3],
    "block_type": "basic_block_vd",
}
RESNET_3_STACKS = {
    **RESNET,
    "stackwise_num_filters": [64, 8, 8],
    "stackwise_num_blocks": [1, 1, 1],
    "stackwise_num_strides": [1, 2, 2],
}
RESNET_4_STACKS = {
    **RESNET,
    "stackwise_num_filters": [64, 8, 8, 8],
    "stackwise_num_blocks": [1, 1, 1, 1],
    "stackwise_num_strides": [1, 2, 2, 2],
}
HGNETV2 = {
    **IMAGE,
    "depths": [1, 1],
    "embedding_size": 8,
    "hidden_sizes": [8, 8],
    "stem_channels": [3, 8, 8],
    "hidden_act": "relu",
    "use_learnable_affine_block": True,
    # Channels in, in the middle and out, blocks, layers, kernel size.
    "stackwise_stage_filters": [[8, 8, 8, 1, 2, 3], [8, 8, 8, 1, 2, 3]],
    "apply_downsample": [False, True],
    "use_lightweight_conv_block": [False, True],
}
MIT = {
    **IMAGE,
    "layerwise_depths": [1, 1],
    "num_layers": 2,
    "layerwise_num_heads": [2, 2],
    "layerwise_sr_ratios": [2, 1],
    "max_drop_path_rate": 0.0,
    "layerwise_patch_sizes": [3, 3],
    "layerwise_strides": [4, 2],
    "hidden_dims": [8, 16],
}
VIT_DET = {
    **IMAGE,
    "hidden_size": 8,
    "num_layers": 2,
    "intermediate_dim": 16,
    "num_heads": 2,
    "global_attention_layer_indices": [1],
    "patch_size": 4,
    "num_output_channels": 8,
    "window_size": 2,
}


def mobilenet_v5():
    block_types = [["er"], ["uir", "mqa"]]
    arguments = {
        "num_filters": 8,
        "strides": 1,
        "act_layers": "relu",
        "exp_ratios": 2.0,
        "se_ratios": 0.0,
        "dw_kernel_sizes": 3,
        "dw_start_kernel_sizes": 0,
        "dw_end_kernel_sizes": 0,
        "exp_kernel_sizes": 3,
        "pw_kernel_sizes": 1,
        "num_heads": 2,
        "key_dims": 4,
        "value_dims": 4,
        "kv_strides": 2,
        "use_cpe": False,
    }
    return models.MobileNetV5Backbone(
        **IMAGE,
        stackwise_block_types=block_types,
        stackwise_num_blocks=[len(stack) for stack in block_types],
        **{
            f"stackwise_{name}": [[value] * len(stack) for stack in block_types]
            for name, value in arguments.items()
        },
        stem_size=8,
        use_msfa=False,
    )


def d_fine():
    return models.DFineBackbone(
        **IMAGE,
        backbone=models.HGNetV2Backbone(**HGNETV2),
        out_features=["stage1", "stage2"],
        encoder_in_channels=[8, 8],
        encoder_hidden_dim=8,
        encode_proj_layers=[1],
        encoder_ffn_dim=16,
        num_encoder_layers=1,
        num_attention_heads=2,
        hidden_expansion=1.0,
        depth_multiplier=0.5,
        hidden_dim=8,
        decoder_in_channels=[8, 8],
        num_decoder_layers=2,
        decoder_attention_heads=2,
        decoder_ffn_dim=16,
        decoder_n_points=[2, 2],
        eval_idx=-1,
        num_feature_levels=2,
        feat_strides=[4, 8],
        anchor_image_size=(16, 16),
        num_queries=4,
        learn_initial_query=False,
        num_labels=5,
        num_denoising=0,
        lqe_hidden_dim=8,
        num_lqe_layers=2,
    )


def sam():
    return models.SAMBackbone(
        image_encoder=models.ViTDetBackbone(**VIT_DET),
        prompt_encoder=layers.SAMPromptEncoder(
            hidden_size=8,
            image_embedding_size=(4, 4),
            input_image_size=(16, 16),
            mask_in_channels=4,
        ),
        mask_decoder=layers.SAMMaskDecoder(
            num_layers=2,
            hidden_size=8,
            intermediate_dim=16,
            num_heads=2,
            embedding_dim=8,
            iou_head_hidden_dim=8,
        ),
    )


def sam3():
    return models.SAM3PromptableConceptBackbone(
        vision_encoder=layers.SAM3VisionEncoder(
            **IMAGE,
            **TRANSFORMER,
            patch_size=4,
            fpn_hidden_dim=8,
            fpn_scale_factors=[4.0, 2.0, 1.0, 0.5],
            pretrain_image_shape=(8, 8, 3),
            window_size=2,
            global_attn_indexes=[1],
        ),
        text_encoder=layers.SAM3TextEncoder(
            **TRANSFORMER, vocabulary_size=VOCABULARY_SIZE, embedding_dim=8
        ),
        geometry_encoder=layers.SAM3GeometryEncoder(**TRANSFORMER, roi_size=3),
        detr_encoder=layers.SAM3DetrEncoder(**TRANSFORMER),
        detr_decoder=layers.SAM3DetrDecoder(
            **IMAGE, **TRANSFORMER, patch_size=4, num_queries=4
        ),
        mask_decoder=layers.SAM3MaskDecoder(
            num_upsampling_stages=3, hidden_dim=8, num_heads=2
        ),
    )


BACKBONES = {
    "CSPNetBackbone": lambda: models.CSPNetBackbone(
        **IMAGE,
        stem_filters=8,
        stem_kernel_size=3,
        stem_strides=1,
        stackwise_num_filters=[8, 8],
        stackwise_strides=[1, 2],
        stackwise_depth=[1, 1],
        block_type="dark_block",
        block_ratio=[0.5],
        stage_type="csp",
    ),
    "DenseNetBackbone": lambda: models.DenseNetBackbone(
        **IMAGE, stackwise_num_repeats=[1, 1], growth_rate=4
    ),
    "EfficientNetBackbone": lambda: models.EfficientNetBackbone(
        input_shape=(16, 16, 3),
        width_coefficient=1.0,
        depth_coefficient=1.0,
        stackwise_kernel_sizes=[3, 3],
        stackwise_num_repeats=[1, 1],
        stackwise_input_filters=[8, 8],
        stackwise_output_filters=[8, 8],
        stackwise_expansion_ratios=[1, 2],
        stackwise_squeeze_and_excite_ratios=[0.25, 0.25],
        stackwise_strides=[1, 2],
        stackwise_block_types=["v1", "fused"],
        dropout=0.0,
    ),
    "HGNetV2Backbone": lambda: models.HGNetV2Backbone(**HGNETV2),
    "MobileNetBackbone": lambda: models.MobileNetBackbone(
        **IMAGE,
        stackwise_expansion=[[8], [8]],
        stackwise_num_blocks=[1, 1],
        stackwise_num_filters=[[8], [8]],
        stackwise_kernel_size=[[3], [3]],
        stackwise_num_strides=[[1], [2]],
        stackwise_se_ratio=[[None], [0.25]],
        stackwise_activation=[["relu"], ["hard_swish"]],
        stackwise_padding=[[1], [1]],
        input_num_filters=8,
        output_num_filters=8,
        depthwise_filters=8,
        depthwise_stride=2,
        depthwise_residual=False,
        last_layer_filter=8,
    ),
    "MobileNetV5Backbone": mobilenet_v5,
    "ResNetBackbone": lambda: models.ResNetBackbone(**IMAGE, **RESNET_3_STACKS),
    "VGGBackbone": lambda: models.VGGBackbone(
        **IMAGE, stackwise_num_repeats=[1, 1], stackwise_num_filters=[8, 8]
    ),
    "XceptionBackbone": lambda: models.XceptionBackbone(
        **IMAGE,
        stackwise_conv_filters=[[4, 4], [8, 8], [8, 8]],
        stackwise_pooling=[False, True, False],
    ),
    "RetinaNetBackbone": lambda: models.RetinaNetBackbone(
        **IMAGE,
        image_encoder=models.ResNetBackbone(**IMAGE, **RESNET_3_STACKS),
        min_level=3,
        max_level=4,
        use_p5=False,
    ),
    "DeepLabV3Backbone": lambda: models.DeepLabV3Backbone(
        **IMAGE,
        image_encoder=models.ResNetBackbone(**IMAGE, **RESNET_3_STACKS),
        spatial_pyramid_pooling_key="P4",
        upsampling_size=4,
        dilation_rates=[1],
        low_level_feature_key="P2",
        projection_filters=8,
    ),
    "BASNetBackbone": lambda: models.BASNetBackbone(
        image_shape=(32, 32, 3),
        image_encoder=models.ResNetBackbone(**RESNET_4_STACKS),
        num_classes=1,
        projection_filters=8,
    ),
    "DFineBackbone": d_fine,
    "DINOV2Backbone": lambda: models.DINOV2Backbone(**DINOV2),
    "DINOV3Backbone": lambda: models.DINOV3Backbone(**DINO),
    "DeiTBackbone": lambda: models.DeiTBackbone(
        **IMAGE, **TRANSFORMER, patch_size=8
    ),
    "DepthAnythingBackbone": lambda: models.DepthAnythingBackbone(
        image_encoder=models.DINOV2Backbone(**{**DINOV2, "patch_size": 4}),
        feature_keys=["stage1", "stage2"],
        reassemble_factors=[2, 1],
        neck_hidden_dims=[8, 8],
        fusion_hidden_dim=8,
        head_hidden_dim=8,
        head_in_index=-1,
    ),
    "MiTBackbone": lambda: models.MiTBackbone(**MIT),
    "SegFormerBackbone": lambda: models.SegFormerBackbone(
        image_encoder=models.MiTBackbone(**MIT), projection_filters=8
    ),
    "SAMBackbone": sam,
    "SAM3PromptableConceptBackbone": sam3,
    # The second block of a stage has shifted windows where the image is
    # larger than one window.
    "SwinTransformerBackbone": lambda: models.SwinTransformerBackbone(
        **IMAGE,
        patch_size=4,
        embed_dim=8,
        depths=[2, 1],
        num_heads=[2, 2],
        window_size=2,
        drop_path=0.0,
    ),
    "ViTBackbone": lambda: models.ViTBackbone(**VIT),
    "ViTDetBackbone": lambda: models.ViTDetBackbone(**VIT_DET),
    "VideoPrismBackbone": lambda: models.VideoPrismBackbone(
        **IMAGE,
        num_frames=2,
        patch_size=8,
        hidden_dim=8,
        intermediate_dim=16,
        num_heads=2,
        num_spatial_layers=1,
        num_temporal_layers=1,
        num_auxiliary_layers=1,
        num_text_layers=2,
        vocabulary_size=VOCABULARY_SIZE,
    ),
    "PARSeqBackbone": lambda: models.PARSeqBackbone(
        image_encoder=models.ViTBackbone(**VIT, use_class_token=False),
        vocabulary_size=VOCABULARY_SIZE,
        max_label_length=12,
        decoder_hidden_dim=8,
        num_decoder_layers=2,
        num_decoder_heads=2,
        decoder_mlp_dim=16,
        dropout_rate=0.0,
        attention_dropout=0.0,
    ),
}

# As in `multimodal.py`.
INPUTS = {
    "SAMBackbone": {
        "labels": (lambda i: np.arange(12) % 2),
        "masks": (1, 16, 16, 1),
    },
    # The batch index of a box, its centre and its size. With more boxes than
    # this, the geometry encoder's mask would not have the shape it needs.
    "SAM3PromptableConceptBackbone": {
        "boxes": lambda i: np.array([[i, 0.4, 0.5, 0.2, 0.3]]),
        "box_labels": [1],
    },
}
