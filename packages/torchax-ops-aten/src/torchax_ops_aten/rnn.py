"""Recurrent layers: each layer of an LSTM, GRU or plain RNN is one scan over time."""

import jax
import jax.numpy as jnp
from jax import lax
from torchax.ops import aten, lowering

from .norm import wide


def _linear(x, weight, bias):
    out = jnp.einsum("...i,oi->...o", x, weight)
    return out if bias is None else out + bias


def _lstm_gates(gates, cell):
    i, f, g, o = jnp.split(gates, 4, axis=-1)
    cell = jax.nn.sigmoid(f) * cell + jax.nn.sigmoid(i) * jnp.tanh(g)
    return jax.nn.sigmoid(o) * jnp.tanh(cell), cell


def _lstm_step(gates, state, weights):
    w_hh, b_hh, w_hr = weights
    hidden, cell = _lstm_gates(gates + _linear(state[0], w_hh, b_hh), state[1])
    return (hidden if w_hr is None else hidden @ w_hr.T), cell


def _gru_gates(x, h, hidden):
    (xr, xz, xn), (hr, hz, hn) = jnp.split(x, 3, axis=-1), jnp.split(h, 3, axis=-1)
    update = jax.nn.sigmoid(xz + hz)
    new = jnp.tanh(xn + jax.nn.sigmoid(xr + hr) * hn)
    return new + update * (hidden - new)


def _gru_step(gates, state, weights):
    return (_gru_gates(gates, _linear(state[0], weights[0], weights[1]), state[0]),)


def _tanh_step(gates, state, weights):
    return (jnp.tanh(gates + _linear(state[0], weights[0], weights[1])),)


def _relu_step(gates, state, weights):
    return (jax.nn.relu(gates + _linear(state[0], weights[0], weights[1])),)


def _layer(step, xs, state, params, has_biases, reverse, present=None):
    """One direction of one layer over ``[T, B, I]``: outputs ``[T, B, H]`` and the last state.

    Where `present` (``[T, B, 1]``) is False, a sequence has ended (or not begun, in reverse): its state stays.
    """
    w_ih, w_hh, *rest = params
    b_ih, b_hh = rest[:2] if has_biases else (None, None)
    rest = rest[2:] if has_biases else rest
    gates = _linear(xs, w_ih, b_ih)  # the inputs' part of all steps is one matrix product
    if step is not _gru_step and b_hh is not None:  # and what each step would add: GRU multiplies a part of it
        gates, b_hh = gates + b_hh, None
    weights = (w_hh, b_hh, rest[0] if rest else None)

    def body(carry, inputs):
        gate, here = inputs
        new = step(gate, carry, weights)
        if here is not None:
            new = tuple(jnp.where(here, n, c) for n, c in zip(new, carry, strict=True))
        return new, new[0]

    last, out = lax.scan(body, state, (gates, present), reverse=reverse)
    return out, last


def _run(step, input, states, params, has_biases, num_layers, bidirectional, batch_first, present=None):
    """All layers: the outputs of the last one, and the last state of each layer and direction."""
    low = input.dtype
    xs, states, params = wide(input), [wide(s) for s in states], [wide(p) for p in params]
    xs = jnp.swapaxes(xs, 0, 1) if batch_first else xs
    directions = 2 if bidirectional else 1
    per = len(params) // (num_layers * directions)
    finals = []
    for layer in range(num_layers):
        outputs = []
        for direction in range(directions):
            i = layer * directions + direction
            out, last = _layer(
                step,
                xs,
                tuple(s[i] for s in states),
                params[i * per : (i + 1) * per],
                has_biases,
                direction == 1,
                present,
            )
            outputs.append(out)
            finals.append(last)
        xs = outputs[0] if directions == 1 else jnp.concatenate(outputs, axis=-1)
    out = jnp.swapaxes(xs, 0, 1) if batch_first else xs
    return out.astype(low), *(jnp.stack(s).astype(low) for s in zip(*finals, strict=True))


def _no_dropout(input, hx, params, has_biases, num_layers, dropout, train, bidirectional, batch_first):
    # between layers only: a single layer draws nothing
    return (
        input.ndim == 3 and input.shape[0] > 0 and input.shape[1] > 0 and (not train or dropout == 0 or num_layers == 1)
    )


@lowering(aten.lstm.input, whole=True, when=_no_dropout)
def lstm(input, hx, params, has_biases, num_layers, dropout, train, bidirectional, batch_first):
    """Layers of LSTM, with or without projections."""
    return _run(_lstm_step, input, list(hx), params, has_biases, num_layers, bidirectional, batch_first)


@lowering(aten.gru.input, whole=True, when=_no_dropout)
def gru(input, hx, params, has_biases, num_layers, dropout, train, bidirectional, batch_first):
    """Layers of GRU."""
    return _run(_gru_step, input, [hx], params, has_biases, num_layers, bidirectional, batch_first)


@lowering(aten.rnn_tanh.input, whole=True, when=_no_dropout)
def rnn_tanh(input, hx, params, has_biases, num_layers, dropout, train, bidirectional, batch_first):
    """Layers of the plain RNN with tanh."""
    return _run(_tanh_step, input, [hx], params, has_biases, num_layers, bidirectional, batch_first)


@lowering(aten.rnn_relu.input, whole=True, when=_no_dropout)
def rnn_relu(input, hx, params, has_biases, num_layers, dropout, train, bidirectional, batch_first):
    """Layers of the plain RNN with relu."""
    return _run(_relu_step, input, [hx], params, has_biases, num_layers, bidirectional, batch_first)


def _run_packed(step, data, batch_sizes, states, params, has_biases, num_layers, bidirectional):
    """As `_run` for packed sequences, the rows of all steps one after the other: padded, run, and packed again."""
    batch, steps, rows = states[0].shape[1], batch_sizes.shape[0], data.shape[0]
    sizes = jnp.asarray(batch_sizes).astype(jnp.int32)
    ends = jnp.cumsum(sizes)
    column = jnp.arange(batch, dtype=jnp.int32)
    present = column < sizes[:, None]
    padded = data[jnp.where(present, (ends - sizes)[:, None] + column, 0)]
    out, *last = _run(step, padded, states, params, has_biases, num_layers, bidirectional, False, present[..., None])
    row = jnp.arange(rows, dtype=jnp.int32)
    step_of = jnp.searchsorted(ends, row, side="right").astype(jnp.int32)
    flat = step_of * batch + row - (ends - sizes)[step_of]
    return out.reshape(steps * batch, -1)[flat], *last


def _no_dropout_packed(data, batch_sizes, hx, params, has_biases, num_layers, dropout, train, bidirectional):
    return data.shape[0] > 0 and (not train or dropout == 0 or num_layers == 1)


@lowering(aten.lstm.data, whole=True, when=_no_dropout_packed)
def lstm_packed(data, batch_sizes, hx, params, has_biases, num_layers, dropout, train, bidirectional):
    """Layers of LSTM over packed sequences."""
    return _run_packed(_lstm_step, data, batch_sizes, list(hx), params, has_biases, num_layers, bidirectional)


@lowering(aten.gru.data, whole=True, when=_no_dropout_packed)
def gru_packed(data, batch_sizes, hx, params, has_biases, num_layers, dropout, train, bidirectional):
    """Layers of GRU over packed sequences."""
    return _run_packed(_gru_step, data, batch_sizes, [hx], params, has_biases, num_layers, bidirectional)


@lowering(aten.rnn_tanh.data, whole=True, when=_no_dropout_packed)
def rnn_tanh_packed(data, batch_sizes, hx, params, has_biases, num_layers, dropout, train, bidirectional):
    """Layers of the plain RNN with tanh over packed sequences."""
    return _run_packed(_tanh_step, data, batch_sizes, [hx], params, has_biases, num_layers, bidirectional)


@lowering(aten.rnn_relu.data, whole=True, when=_no_dropout_packed)
def rnn_relu_packed(data, batch_sizes, hx, params, has_biases, num_layers, dropout, train, bidirectional):
    """Layers of the plain RNN with relu over packed sequences."""
    return _run_packed(_relu_step, data, batch_sizes, [hx], params, has_biases, num_layers, bidirectional)


def _gates(input, hidden, w_ih, w_hh, b_ih, b_hh):
    return _linear(wide(input), wide(w_ih), wide(b_ih)), _linear(wide(hidden), wide(w_hh), wide(b_hh))


@lowering(aten.lstm_cell.default, whole=True)
def lstm_cell(input, hx, w_ih, w_hh, b_ih=None, b_hh=None):
    """One step of LSTM: new hidden and cell state."""
    x, h = _gates(input, hx[0], w_ih, w_hh, b_ih, b_hh)
    return tuple(t.astype(input.dtype) for t in _lstm_gates(x + h, wide(hx[1])))


@lowering(aten.gru_cell.default, whole=True)
def gru_cell(input, hx, w_ih, w_hh, b_ih=None, b_hh=None):
    """One step of GRU: the new hidden state."""
    return _gru_gates(*_gates(input, hx, w_ih, w_hh, b_ih, b_hh), wide(hx)).astype(input.dtype)


@lowering(aten.rnn_tanh_cell.default, whole=True)
def rnn_tanh_cell(input, hx, w_ih, w_hh, b_ih=None, b_hh=None):
    """One step of the plain RNN with tanh."""
    return jnp.tanh(sum(_gates(input, hx, w_ih, w_hh, b_ih, b_hh))).astype(input.dtype)


@lowering(aten.rnn_relu_cell.default, whole=True)
def rnn_relu_cell(input, hx, w_ih, w_hh, b_ih=None, b_hh=None):
    """One step of the plain RNN with relu."""
    return jax.nn.relu(sum(_gates(input, hx, w_ih, w_hh, b_ih, b_hh))).astype(input.dtype)


def _biased(gates, bias):
    return wide(gates) if bias is None else wide(gates) + wide(bias)


@lowering(aten._thnn_fused_lstm_cell.default)
def fused_lstm_cell(input_gates, hidden_gates, cx, input_bias=None, hidden_bias=None):
    """One step of LSTM from the two products: new hidden and cell state, and the activated gates."""
    gates = _biased(input_gates, input_bias) + _biased(hidden_gates, hidden_bias)
    i, f, g, o = jnp.split(gates, 4, axis=-1)
    workspace = jnp.concatenate([jax.nn.sigmoid(i), jax.nn.sigmoid(f), jnp.tanh(g), jax.nn.sigmoid(o)], axis=-1)
    return *_lstm_gates(gates, wide(cx)), workspace


@lowering(aten._thnn_fused_lstm_cell_backward_impl.default)
def fused_lstm_cell_backward(grad_hy, grad_cy, cx, cy, workspace, has_bias):
    """Gradients of the gates, the old cell state and the biases."""
    i, f, g, o = jnp.split(wide(workspace), 4, axis=-1)
    top = jnp.tanh(wide(cy))
    grad_hidden = jnp.zeros_like(top) if grad_hy is None else wide(grad_hy)
    grad_cell = grad_hidden * o * (1 - top * top)
    if grad_cy is not None:
        grad_cell = grad_cell + wide(grad_cy)
    parts = [
        grad_cell * g * i * (1 - i),
        grad_cell * wide(cx) * f * (1 - f),
        grad_cell * i * (1 - g * g),
        grad_hidden * top * o * (1 - o),
    ]
    gates = jnp.concatenate(parts, axis=-1)
    return gates, grad_cell * f, gates.sum(0) if has_bias else None


@lowering(aten._thnn_fused_gru_cell.default)
def fused_gru_cell(input_gates, hidden_gates, hx, input_bias=None, hidden_bias=None):
    """One step of GRU from the two products: new hidden state, and what the backward needs."""
    x, h, hidden = _biased(input_gates, input_bias), _biased(hidden_gates, hidden_bias), wide(hx)
    (xr, xz, xn), (hr, hz, hn) = jnp.split(x, 3, axis=-1), jnp.split(h, 3, axis=-1)
    reset, update = jax.nn.sigmoid(xr + hr), jax.nn.sigmoid(xz + hz)
    new = jnp.tanh(xn + reset * hn)
    return new + update * (hidden - new), jnp.concatenate([reset, update, new, hidden, hn], axis=-1)


@lowering(aten._thnn_fused_gru_cell_backward.default)
def fused_gru_cell_backward(grad_hy, workspace, has_bias):
    """Gradients of the input's gates, the hidden state's gates, the hidden state and the biases."""
    reset, update, new, hidden, hn = jnp.split(wide(workspace), 5, axis=-1)
    grad = wide(grad_hy)
    grad_update = grad * (hidden - new) * update * (1 - update)
    grad_new = grad * (1 - update) * (1 - new * new)
    grad_reset = grad_new * hn * reset * (1 - reset)
    inputs = jnp.concatenate([grad_reset, grad_update, grad_new], axis=-1)
    hiddens = jnp.concatenate([grad_reset, grad_update, grad_new * reset], axis=-1)
    biases = (inputs.sum(0), hiddens.sum(0)) if has_bias else (None, None)
    return inputs, hiddens, grad * update, *biases
