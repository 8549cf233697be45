"""Dense layers whose update comes from an FVAE."""

import contextlib
import types
from typing import Any
from typing import NamedTuple

import keras
import numpy as np
from keras import ops

from keras_fvae.backend import keras_internals
from keras_fvae.backend import replicas
from keras_fvae.backend.scoped import ScopedValue
from keras_fvae.layers import masking
from keras_fvae.layers import sharding
from keras_fvae.layers import switching
from keras_fvae.layers.contraction import analyze_equation
from keras_fvae.methods.fvae.config import FVAELoRAConfig
from keras_fvae.methods.fvae.config import resolve_config
from keras_fvae.methods.fvae.fvae import FVAE
from keras_fvae.methods.fvae.fvae import NotRematerialized
from keras_fvae.methods.fvae.layout import layout

# Those in which Keras gives the gradient with respect to a layer's input.
QUANTIZATION_MODES = (None, "int8", "int4")
ADAPTED_MARK = "keras_fvae"
# An attribute that models which hold adapted layers have.
CONTAINER_MARK = "base_call_signature"


# What the model or the step around adapted layers says of `training`.
_training = ScopedValue()


def known_training(training):
    """Says whether adapted layers train that are called inside the block.

    Not all models pass `training` on to all layers, and some call themselves
    once more in `compute_loss` without a word of it.

    Args:
        training: Boolean, or `None` if nothing is known.
    """
    return _training.set_to(training)


def is_training(training):
    """Whether a layer trains.

    It does if it is told so; else if the innermost model or step around it
    was; and if nothing was said at all, if Keras is in a training step.

    Args:
        training: Boolean or `None`, what the layer was called with. Layers
            around it may pass on `False` by default, unasked.
    """
    if training or _training.value:
        return True
    return _training.value is None and keras_internals.is_in_training_step()


# In which trace of the backend the outermost model was called.
_outer_trace = ScopedValue()


def called_in_this_trace():
    """Says where a model is called that adapted layers are in, for a block."""
    if _outer_trace.value is not None:
        return contextlib.nullcontext()
    return _outer_trace.set_to((keras_internals.trace_state(),))


def refuse_inside_transformation(layer):
    """Refuses to train inside a function that the backend transforms.

    Raises:
        ValueError: If the layer is in such a function inside the model.
    """
    if _outer_trace.value not in (None, (keras_internals.trace_state(),)):
        raise ValueError(
            f"The adapted layer '{layer.path}' is called inside a function "
            f"that {keras.config.backend()} transforms, such as a branch of "
            "`ops.cond`, the body of a loop or of `ops.map`, `jax.jit` or "
            "`jax.checkpoint`. In training, neither the loss of its adapter "
            "nor its random numbers get out of there. Call the layer outside "
            "of it, or leave it out of `target_layer_names`."
        )


# Where adapted layers put their posteriors, if anywhere.
_recorded = ScopedValue()


class Record(NamedTuple):
    """What an adapted layer was called on: the posteriors of its tokens."""

    adapter: Any
    q1: Any
    q2: Any
    mask: Any


@contextlib.contextmanager
def recorded_posteriors():
    """Records the posteriors of the adapted layers called inside the block.

    Yields:
        List, to which each call at inference adds a `Record`.
    """
    records = []
    with _recorded.set_to(records):
        yield records


class Adapter(keras.Layer):
    """The update `scale * z1 B`, and the loss of the FVAE that gives z1.

    Not called itself: for what it does, that would take as long on PyTorch.

    Args:
        config: `FVAELoRAConfig`.
        equation: String, the einsum equation of the layer that is adapted.
        regularizer: Optional regularizer of B.
        finalized: Boolean. Whether to hold only what inference needs.
        **kwargs: Base layer keyword arguments, such as `name` and `dtype`.
    """

    def __init__(
        self, config, equation, regularizer=None, finalized=False, **kwargs
    ):
        super().__init__(**kwargs)
        self.config = config
        self.equation = equation
        self.regularizer = regularizer
        self.fvae = FVAE(
            config, finalized, dtype=self.dtype_policy, name="fvae"
        )

    def build(self, input_shape, kernel_shape):
        contraction = analyze_equation(self.equation, len(input_shape))
        self.kernel_shape = tuple(kernel_shape)
        self.fvae.build((None, contraction.width(kernel_shape)))
        self.kernel_b = self.add_weight(
            name="kernel_b",
            shape=(self.config.rank, contraction.units(kernel_shape)),
            initializer=self._initial_kernel_b,
            regularizer=self.regularizer,
            dtype="float32",
            autocast=False,
        )

    def _initial_kernel_b(self, shape, dtype=None):
        numbers = self.fvae.initial_generator("kernel_b").normal(size=shape)
        return ops.convert_to_tensor((0.02 * numbers).astype(dtype), dtype)

    def encode(self, inputs, training, mask):
        """The latent z1 of each token. In training, the loss is added.

        Args:
            inputs: Tensor, the input of the adapted layer.
            training: Boolean. In training z1 is drawn; at inference it is its
                posterior mean.
            mask: Optional tensor of the shape of the first axes of `inputs`,
                1 or `True` for the tokens that count in the loss.

        Returns:
            Float32 tensor of shape `(..., rank)`.
        """
        contraction = analyze_equation(self.equation, len(inputs.shape))
        x = contraction.to_tokens(inputs, self.kernel_shape)
        records = _recorded.value
        if records is not None:
            records.append(Record(self, *self.fvae.posteriors(x), mask))
        if training:
            x = ops.reshape(x, (-1, x.shape[-1]))
            token_shape = contraction.token_shape(inputs)
            score = self.fvae.encode_and_score(
                x, training=True, mask=masking.flatten_mask(mask, token_shape)
            )
            z1, _ = ops.unstack(score.z, 2, axis=-2)
            elbo_weight = self.fvae.objective_weights.elbo_weight
            self._add_to_mean_loss(elbo_weight * score.loss)
        elif self.config.sample_at_inference:
            z1 = self.fvae.sample_z1(x)
        else:
            z1 = self.fvae.posterior_mean(x)
        if len(z1.shape) > len(x.shape):
            # The update is linear in z1: the mean of the draws is enough.
            z1 = ops.mean(z1, axis=0)
        return z1

    def add_update(self, outputs, z1, inputs):
        """Adds the update to what the frozen layer computed.

        Args:
            outputs: Tensor, the frozen layer's output. On PyTorch it is
                changed in place, which takes its time to get memory for one
                more.
            z1: Tensor, what `encode` returned for the input.
            inputs: Tensor, the input of the adapted layer.

        Returns:
            Tensor of the shape and dtype of `outputs`.
        """
        kernel_b = self.config.scale * self.kernel_b.value
        contraction = analyze_equation(self.equation, len(inputs.shape))
        return contraction.add_product(
            outputs, z1, kernel_b, inputs, self.kernel_shape
        )

    def _add_to_mean_loss(self, loss):
        """Adds a loss such that those of all calls in a step sum to the mean.

        A layer that is called twice, such as ALBERT's, weighs as much as one
        that is called once. The FVAE has no other losses.
        """
        previous = self.fvae.losses
        self.fvae.add_loss((loss - sum(previous)) / (len(previous) + 1))

    def compute_mask(self, inputs, previous_mask):
        return None

    @property
    def finalized(self):
        """Boolean, whether only what inference needs is left."""
        return self.fvae.finalized

    @property
    def array_shapes(self):
        """Dict of name to shape, of the arrays that `get_arrays` returns."""
        kernel_b_shape = tuple(self.kernel_b.shape)
        return {"kernel_b": kernel_b_shape, **self.fvae.array_shapes}

    def get_arrays(self, finalized=False):
        """The weights, all or what inference needs: name to NumPy array."""
        kernel_b = replicas.to_numpy(self.kernel_b)
        return {"kernel_b": kernel_b, **self.fvae.get_arrays(finalized)}

    def set_arrays(self, arrays):
        """Sets the weights from what `get_arrays` returned."""
        self.kernel_b.assign(arrays["kernel_b"])
        self.fvae.set_arrays(arrays)

    @property
    def num_inference_parameters(self):
        """Integer, the parameters that inference needs: B, the way to z1."""
        rank, units = self.kernel_b.shape
        return rank * units + self.fvae.num_inference_parameters


class FVAELoRAMixin(NotRematerialized, keras_internals.Pickled):
    """What the adapted layers share: all but how they contract.

    The frozen layer computes what it always did, with Keras's own code for
    its weights, quantized or not; the update is added before the activation.
    """

    def __new__(cls, *args, **kwargs):
        # Of the same class as a layer that was adapted in place.
        return super().__new__(IN_PLACE.get(cls, cls), *args, **kwargs)

    def _init_adapter(self, rank, config):
        """The part of `__init__` that the adapted layers share."""
        if self.lora_rank:
            raise ValueError(
                "A layer takes either LoRA or FVAE-LoRA, not both. "
                f"Received: lora_rank={self.lora_rank}. Leave it out."
            )
        self.adapter = new_adapter(self, resolve_config(rank, config))

    @property
    def config(self):
        """The `FVAELoRAConfig` of the layer's adapter."""
        return self.adapter.config

    @property
    def trainable(self):
        """Boolean, whether the adapter trains. The base weights never do."""
        return super().trainable

    @trainable.setter
    def trainable(self, value):
        keras.Layer.trainable.fset(self, value)
        self._freeze_base()

    def build(self, input_shape):
        super().build(input_shape)
        with sharding.distributed_by(None):
            self.adapter.build(input_shape, self.kernel.shape)
        follow_kernel(self, self.adapter.variables)
        self._freeze_base()

    def call(self, inputs, training=None):
        return self._add_update_to(super().call, inputs, training)

    def quantized_call(self, inputs, training=None):
        return self._add_update_to(super().quantized_call, inputs, training)

    def enable_lora(self, *args, **kwargs):
        raise ValueError(
            f"Layer '{self.name}' is adapted by FVAE-LoRA already. A layer "
            "takes either LoRA or FVAE-LoRA, not both."
        )

    def save_own_variables(self, store):
        super().save_own_variables(store)
        # A layer without an adapter would load the base weights and pass the
        # adapter's over. One more entry than it expects makes it refuse.
        store[ADAPTED_MARK] = np.ones((), "int8")

    def load_own_variables(self, store):
        own = {name: store[name] for name in [*store.keys()]}
        own.pop(ADAPTED_MARK, None)
        super().load_own_variables(own)

    def get_config(self):
        return {
            **super().get_config(),
            "config": self.config.get_config(),
            "finalized": self.adapter.finalized,
        }

    @classmethod
    def from_config(cls, config):
        config = {**config, "config": FVAELoRAConfig(**config["config"])}
        finalized = config.pop("finalized")
        layer = super().from_config(config)
        layer.adapter.fvae.finalized = finalized
        return layer

    def _add_update_to(self, base_call, inputs, training):
        _note_entries()
        if switching.is_any_off() and replicas.are_several():
            raise ValueError(
                "With several replicas of TensorFlow adapters cannot be "
                "switched off: each replica is a thread of its own, and does "
                "not know. Leave the `fvae_lora_disabled` block first."
            )
        if switching.is_off(self):
            return base_call(inputs, training=training)
        training = self._draws_latents(inputs, training)
        if training or self.config.sample_at_inference:
            refuse_inside_transformation(self)
        base_inputs = inputs
        inputs = keras_internals.to_features(inputs, self.compute_dtype)
        mask = None
        # Inference needs to know of no token whether it counts.
        if training or _recorded.value is not None:
            contraction = analyze_equation(
                self.adapter.equation, len(inputs.shape)
            )
            mask = masking.find_token_mask(
                inputs, contraction.num_leading_token_axes
            )
        z1 = self.adapter.encode(inputs, training, mask)
        is_linear = self.activation in (None, keras.activations.linear)
        if not is_linear:
            base_call = types.MethodType(
                base_call.__func__, _WithoutActivation(self)
            )
        outputs = base_call(base_inputs, training=training)
        outputs = self.adapter.add_update(outputs, z1, inputs)
        return outputs if is_linear else self.activation(outputs)

    def _draws_latents(self, inputs, training):
        """Whether the layer computes as in training.

        As all of Keras's layers do, it does not while it is frozen. Nor is
        there anything to draw for no tokens.
        """
        if not is_training(training):
            return False
        self.adapter.fvae.refuse_if_finalized()
        return 0 not in inputs.shape and bool(
            self.adapter.fvae.trainable_weights
        )

    def _freeze_base(self):
        """Keeps every weight but the adapter's from training."""
        adapter_ids = {id(variable) for variable in self.adapter.variables}
        for variable in self.variables:
            if id(variable) not in adapter_ids:
                variable.trainable = False


def _note_entries():
    """Makes the models that are being called such that know of adapters.

    Those that were made around an adapted model do not yet.
    """
    if keras_internals.is_compiling():
        return
    for model in keras_internals.entry_models():
        if not hasattr(model, CONTAINER_MARK):
            # Which imports this module.
            from keras_fvae.model import containers

            containers.make_container(model)


@keras.saving.register_keras_serializable(package="keras_fvae")
class FVAELoRADense(FVAELoRAMixin, keras.layers.Dense):
    """`keras.layers.Dense`, frozen, with an FVAE-LoRA update.

    `output = activation(dot(input, kernel) + bias + scale * dot(z1, B))`,
    where z1 is drawn from the posterior that an FVAE gives each input vector
    in training, and is the posterior's mean at inference. Only the FVAE and B
    are trained; in training the layer adds the FVAE's loss.

    Args:
        units: Positive integer, dimensionality of the output space.
        rank: Positive integer, width of the latents. Defaults to `16`.
        config: Optional `keras_fvae.FVAELoRAConfig` with all settings, whose
            `rank` then counts.
        **kwargs: Every argument of `keras.layers.Dense`, but for LoRA's. The
            `kernel_regularizer` applies to B; the `kernel_constraint` has
            nothing to act on, since the kernel is frozen.

    Input shape:
        N-D tensor with shape `(batch_size, ..., input_dim)`. Each vector
        along the last axis is a token of the FVAE.

    Output shape:
        N-D tensor with shape `(batch_size, ..., units)`.

    Raises:
        ValueError: If `rank` is not a positive integer, or not that of
            `config`, or a LoRA argument is given.

    Example:

    >>> layer = keras_fvae.FVAELoRADense(8, rank=4, activation="relu")
    >>> tuple(layer(np.ones((2, 10, 32))).shape)
    (2, 10, 8)

    Reference: [Latent Space Factorization in LoRA](
    https://arxiv.org/abs/2510.19640), section 3.
    """

    def __init__(self, units, rank=16, config=None, **kwargs):
        super().__init__(units, **kwargs)
        self._init_adapter(rank, config)


@keras.saving.register_keras_serializable(package="keras_fvae")
class FVAELoRAEinsumDense(FVAELoRAMixin, keras.layers.EinsumDense):
    """`keras.layers.EinsumDense`, frozen, with an FVAE-LoRA update.

    As `keras_fvae.FVAELoRADense`, for any equation in which each kernel axis
    is either contracted with the input or carried to the output. A token is
    the vector of all contracted axes, of width d; B is `(rank, k)`, with k
    the number of elements of all carried axes.

    Args:
        equation: String, an einsum equation such as `"abc,cde->abde"`.
        output_shape: Integer or tuple, as in `keras.layers.EinsumDense`.
        rank: Positive integer, width of the latents. Defaults to `16`.
        config: Optional `keras_fvae.FVAELoRAConfig` with all settings, whose
            `rank` then counts.
        **kwargs: Every argument of `keras.layers.EinsumDense`, but for
            LoRA's. The `kernel_regularizer` applies to B; the
            `kernel_constraint` has nothing to act on, since the kernel is
            frozen.

    Raises:
        ValueError: If `rank` is not a positive integer, or not that of
            `config`, a LoRA argument is given, or (when the layer is built)
            the equation cannot be adapted.

    Example:

    >>> layer = keras_fvae.FVAELoRAEinsumDense(
    ...     "abc,cde->abde", output_shape=(None, 2, 8), rank=4, bias_axes="de"
    ... )
    >>> tuple(layer(np.ones((2, 10, 32))).shape)
    (2, 10, 2, 8)

    Reference: [Latent Space Factorization in LoRA](
    https://arxiv.org/abs/2510.19640), section 3.
    """

    def __init__(self, equation, output_shape, rank=16, config=None, **kwargs):
        super().__init__(equation, output_shape, **kwargs)
        self._init_adapter(rank, config)


def _in_place(adapted_class, base):
    """The class of a layer of class `base` once it is adapted.

    Keras finds the weights of the layers in a list by the names of their
    classes, which so stay what they were.
    """
    register = keras.saving.register_keras_serializable(package="keras_fvae")
    return register(
        type(base.__name__, (adapted_class,), {"__module__": __name__})
    )


IN_PLACE = {
    FVAELoRADense: _in_place(FVAELoRADense, keras.layers.Dense),
    FVAELoRAEinsumDense: _in_place(
        FVAELoRAEinsumDense, keras.layers.EinsumDense
    ),
}
# By the class of a plain layer.
ADAPTED_CLASSES = {
    keras.layers.Dense: IN_PLACE[FVAELoRADense],
    keras.layers.EinsumDense: IN_PLACE[FVAELoRAEinsumDense],
}


def check_adaptable(layer):
    """Refuses a layer that cannot be adapted in place.

    Args:
        layer: `keras.layers.Dense` or `keras.layers.EinsumDense`.

    Raises:
        ValueError: If the layer is of another class, not built, adapted
            already, or has LoRA, a kernel constraint, an equation that cannot
            be adapted, or was quantized in other modes than int8 and int4.
    """
    what = f"layer '{layer.path or layer.name}'"
    if isinstance(layer, FVAELoRAMixin):
        raise ValueError(f"The {what} is adapted by FVAE-LoRA already.")
    if type(layer) not in ADAPTED_CLASSES:
        kind = f"of class `{type(layer).__name__}`"
        for base in ADAPTED_CLASSES:
            if isinstance(layer, base):
                kind += (
                    f", which derives from `{base.__name__}` and may compute "
                    "something else"
                )
        raise ValueError(
            "FVAE-LoRA adapts layers of the classes `Dense` and `EinsumDense` "
            f"themselves. The {what} is {kind}."
        )
    if not layer.built:
        raise ValueError(
            f"The {what} is not built. Call the model on data, or build it, "
            "before you enable FVAE-LoRA."
        )
    if layer.lora_enabled:
        raise ValueError(
            f"LoRA is enabled on the {what} already. A layer takes either LoRA "
            "or FVAE-LoRA: start from a model without LoRA."
        )
    if layer.kernel_constraint is not None:
        raise ValueError(
            f"The {what} has a kernel constraint, which could not hold for the "
            "kernel and the update together. Remove the `kernel_constraint`, "
            "or leave the layer out of `target_layer_names`."
        )
    if layer.quantization_mode not in QUANTIZATION_MODES:
        raise ValueError(
            f"The {what} is quantized in the mode '{layer.quantization_mode}'. "
            "FVAE-LoRA adapts quantized layers of the modes 'int8' and 'int4'."
        )
    analyze_equation(_equation(layer), _input_rank(layer))


def new_adapter(layer, config, finalized=False):
    """An adapter for a layer, neither built nor attached.

    Args:
        layer: `keras.layers.Dense` or `keras.layers.EinsumDense`.
        config: `FVAELoRAConfig`.
        finalized: Boolean. Whether to hold only what inference needs.

    Returns:
        An `Adapter`.
    """
    return Adapter(
        config,
        equation=_equation(layer),
        regularizer=layer.kernel_regularizer,
        finalized=finalized,
        dtype=layer.compute_dtype,
        name="adapter",
    )


def adapter_shapes(layer, config, finalized=False):
    """The shapes of an adapter's arrays, without an adapter.

    Args:
        layer: `keras.layers.Dense` or `keras.layers.EinsumDense`, built.
        config: `FVAELoRAConfig`.
        finalized: Boolean. Whether only what inference needs is held.

    Returns:
        Dict of name to shape, as `Adapter.array_shapes`.
    """
    contraction = analyze_equation(_equation(layer), _input_rank(layer))
    kernel_shape = layer.kernel.shape
    feature_packing, latent_packing = layout(
        config, contraction.width(kernel_shape), finalized
    )
    return {
        "kernel_b": (config.rank, contraction.units(kernel_shape)),
        **feature_packing.shapes,
        **latent_packing.shapes,
    }


def build_adapter(layer, config, finalized=False):
    """A built adapter for a built layer, not attached to it yet."""
    with (
        replicas.scope_of(keras_internals.kernel_of(layer)),
        sharding.distributed_by(None),
    ):
        adapter = new_adapter(layer, config, finalized)
        # The variables get the paths that they will have in the layer.
        with keras.name_scope(layer.name, caller=layer):
            adapter.build((None,) * _input_rank(layer), layer.kernel.shape)
    follow_kernel(layer, adapter.variables)
    return adapter


def follow_kernel(layer, variables):
    """Lays variables of a layer out as its kernel is, on a mesh of devices.

    Args:
        layer: `keras.layers.Dense` or `keras.layers.EinsumDense`, built.
        variables: List of `keras.Variable`, of its adapter or a bias.
    """
    contraction = analyze_equation(_equation(layer), _input_rank(layer))
    kernel = keras_internals.kernel_of(layer)
    sharding.follow_kernel(kernel, contraction, variables)


def attach_adapter(layer, adapter):
    """Turns a layer into an adapted one, in place: the same object.

    Args:
        layer: Layer that `check_adaptable` accepts.
        adapter: What `build_adapter` returned for it.
    """
    with keras_internals.unlocked(layer):
        layer.adapter = adapter
    layer.__class__ = ADAPTED_CLASSES[type(layer)]
    layer._freeze_base()


def detach_adapter(layer):
    """Turns an adapted layer back into a plain one; the reverse of attaching.

    Args:
        layer: Adapted layer, whose base weights stay frozen.
    """
    keras_internals.untrack(layer, layer.adapter)
    del layer.adapter
    layer.__class__ = next(
        base for base in ADAPTED_CLASSES if isinstance(layer, base)
    )


def merge_update(layer, update):
    """Folds an update that is linear in the input into a layer's weights.

    Args:
        layer: Layer that `detach_adapter` made plain.
        update: What `linear_update` returned for its adapter before.
    """
    matrix, offset = update
    contraction = analyze_equation(_equation(layer), _input_rank(layer))
    shape = tuple(layer.kernel.shape)
    axes = contraction.kernel_contracted_axes + contraction.kernel_carried_axes
    matrix = matrix.reshape([shape[axis] for axis in axes])
    matrix = matrix.transpose(np.argsort(axes))
    layer.kernel.assign(replicas.to_numpy(layer.kernel) + matrix)
    widen_bias(layer)
    offset = offset.reshape(layer.bias.shape)
    layer.bias.assign(replicas.to_numpy(layer.bias) + offset)


def linear_update(adapter):
    """The matrix and offset of the update of an adapter with linear encoders.

    Args:
        adapter: Built `Adapter` whose encoders have no hidden layers.

    Returns:
        Pair of NumPy arrays, of shapes `(d, k)` and `(k,)`.
    """
    arrays = adapter.get_arrays(finalized=True)
    kernel_b = adapter.config.scale * arrays["kernel_b"].astype("float64")
    return (
        arrays["encoder_kernel_0"][:, 0] @ kernel_b,
        arrays["encoder_bias_0"][0] @ kernel_b,
    )


def widen_bias(layer):
    """Gives a layer a bias for each unit, if it has none or a narrower one.

    Args:
        layer: Built `keras.layers.Dense` or `keras.layers.EinsumDense`.
    """
    contraction = analyze_equation(_equation(layer), _input_rank(layer))
    shape = contraction.bias_shape(layer.kernel.shape)
    if layer.bias is not None and tuple(layer.bias.shape) == shape:
        return
    previous = layer.bias
    with (
        keras_internals.unlocked(layer),
        keras.name_scope(layer.name, caller=layer),
        replicas.scope_of(keras_internals.kernel_of(layer)),
    ):
        if previous is not None:
            keras_internals.untrack(layer, previous)
        layer.bias = layer.add_weight(
            name="bias", shape=shape, initializer="zeros", trainable=False
        )
    follow_kernel(layer, [layer.bias])
    if previous is not None:
        layer.bias.assign(ops.broadcast_to(previous, shape))
    if hasattr(layer, "bias_axes"):
        outputs = layer.equation.split("->")[1]
        kernel = layer.equation.split("->")[0].split(",")[1]
        layer.bias_axes = "".join(axis for axis in outputs if axis in kernel)
    else:
        layer.use_bias = True
    layer.has_widened_bias = True


def has_widened_bias(layer):
    """Whether `widen_bias` has changed the layer."""
    return getattr(layer, "has_widened_bias", False)


def _equation(layer):
    return getattr(layer, "equation", "...d,dk->...k")


def _input_rank(layer):
    return layer.input_spec.ndim or layer.input_spec.min_ndim


class _WithoutActivation:
    """A layer seen without its activation, so that its call leaves it out."""

    activation = None

    def __init__(self, layer):
        self._layer = layer

    def __getattr__(self, name):
        value = getattr(self._layer, name)
        if getattr(value, "__self__", None) is self._layer:
            # What a method calls in its turn has no activation either.
            return types.MethodType(value.__func__, self)
        return value
