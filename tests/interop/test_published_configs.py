"""The config.json of published models, written from their documentation: what is supported has the published size."""

import pytest

from lmscale.errors import ConfigError
from lmscale.interop.huggingface_config import read_config_with_notes
from lmscale.interop.huggingface_write import same_function, write_config
from lmscale.plan.parameters import parameter_count

LLAMA_3_8B = {
  'architectures': ['LlamaForCausalLM'], 'model_type': 'llama', 'hidden_size': 4096, 'intermediate_size': 14336, 'num_hidden_layers': 32,
  'num_attention_heads': 32, 'num_key_value_heads': 8, 'vocab_size': 128256, 'hidden_act': 'silu', 'rms_norm_eps': 1e-5, 'rope_theta': 500000.0,
  'max_position_embeddings': 8192, 'attention_bias': False, 'attention_dropout': 0.0, 'bos_token_id': 128000, 'eos_token_id': 128001,
  'initializer_range': 0.02, 'pretraining_tp': 1, 'rope_scaling': None, 'tie_word_embeddings': False, 'torch_dtype': 'bfloat16',
}  # fmt: skip
LLAMA_31_8B = LLAMA_3_8B | {
  'max_position_embeddings': 131072, 'mlp_bias': False,
  'rope_scaling': {'factor': 8.0, 'low_freq_factor': 1.0, 'high_freq_factor': 4.0, 'original_max_position_embeddings': 8192, 'rope_type': 'llama3'},
}  # fmt: skip
NEMOTRON_H_8B = {
  'architectures': ['NemotronHForCausalLM'], 'model_type': 'nemotron_h', 'auto_map': {'AutoConfig': 'configuration_nemotron_h.NemotronHConfig'},
  'hidden_size': 4096, 'intermediate_size': 21504, 'num_hidden_layers': 52, 'vocab_size': 131072,
  'hybrid_override_pattern': 'M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-', 'num_attention_heads': 32, 'attention_head_dim': 128,
  'num_key_value_heads': 8, 'mamba_num_heads': 128, 'mamba_head_dim': 64, 'n_groups': 8, 'ssm_state_size': 128, 'conv_kernel': 4, 'expand': 2,
  'chunk_size': 128, 'mlp_hidden_act': 'relu2', 'mamba_hidden_act': 'silu', 'layer_norm_epsilon': 1e-5, 'use_bias': False, 'mlp_bias': False,
  'attention_bias': False, 'mamba_proj_bias': False, 'use_conv_bias': True, 'residual_in_fp32': False, 'tie_word_embeddings': False,
  'time_step_limit': [0.0, float('inf')], 'time_step_min': 0.001, 'time_step_max': 0.1, 'time_step_floor': 1e-4, 'sliding_window': None,
  'rescale_prenorm_residual': True, 'initializer_range': 0.02, 'torch_dtype': 'bfloat16',
}  # fmt: skip
NEMOTRON_H_47B = NEMOTRON_H_8B | {
  'hidden_size': 8192, 'intermediate_size': 30720, 'num_hidden_layers': 98, 'num_attention_heads': 64, 'mamba_num_heads': 256, 'ssm_state_size': 256,
  'hybrid_override_pattern':
    'M-M-M-M-M-M-M-M-M*-M-M-M-M-M-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-M-M---MM---M-M*-M-M-M-M-M-',
}  # fmt: skip
MAMBA2_27B = {
  'architectures': ['Mamba2ForCausalLM'], 'model_type': 'mamba2', 'hidden_size': 2560, 'num_hidden_layers': 64, 'num_heads': 80, 'head_dim': 64,
  'state_size': 128, 'n_groups': 1, 'conv_kernel': 4, 'expand': 2, 'chunk_size': 256, 'vocab_size': 50288, 'layer_norm_epsilon': 1e-5,
  'use_bias': False, 'use_conv_bias': True, 'hidden_act': 'silu', 'residual_in_fp32': True, 'rms_norm': True, 'norm_before_gate': False,
  'time_step_limit': [0.0, float('inf')], 'time_step_rank': 160, 'tie_word_embeddings': True,
}  # fmt: skip
CODESTRAL_MAMBA = MAMBA2_27B | {
  'hidden_size': 4096, 'num_heads': 128, 'n_groups': 8, 'vocab_size': 32768, 'tie_word_embeddings': False, 'norm_before_gate': True,
  'time_step_rank': 256,
}  # fmt: skip
BAMBA_9B = {
  'architectures': ['BambaForCausalLM'], 'model_type': 'bamba', 'hidden_size': 4096, 'intermediate_size': 14336, 'num_hidden_layers': 32,
  'num_attention_heads': 32, 'num_key_value_heads': 8, 'attn_layer_indices': [9, 18, 27], 'attn_rotary_emb': 64, 'hidden_act': 'silu',
  'mamba_n_heads': 128, 'mamba_d_head': 64, 'mamba_n_groups': 1, 'mamba_d_state': 128, 'mamba_d_conv': 4, 'mamba_expand': 2,
  'mamba_chunk_size': 256, 'mamba_conv_bias': True, 'mamba_proj_bias': False, 'rms_norm_eps': 1e-5, 'rope_theta': 10000.0, 'vocab_size': 128256,
  'max_position_embeddings': 262144, 'num_logits_to_keep': 1, 'tie_word_embeddings': False,
}  # fmt: skip
FLOOR = "time_step_min: transformers' plain path raises every dt to 0.001"
GATE = 'norm_before_gate: true has no effect in transformers'


@pytest.mark.parametrize(
  ('values', 'published', 'layers', 'note'),
  [
    pytest.param(LLAMA_3_8B, '8.03 B', {'*': 32, '-': 32}, '', id='Llama-3-8B'),
    pytest.param(LLAMA_31_8B, '8.03 B', {'*': 32, '-': 32}, '', id='Llama-3.1-8B'),
    pytest.param(NEMOTRON_H_8B, '8.1 B', {'M': 24, '*': 4, '-': 24}, FLOOR, id='Nemotron-H-8B'),
    pytest.param(NEMOTRON_H_47B, '47 B', {'M': 45, '*': 5, '-': 48}, FLOOR, id='Nemotron-H-47B'),
    pytest.param(MAMBA2_27B, '2.7 B', {'M': 64}, '', id='Mamba-2-2.7B'),
    pytest.param(CODESTRAL_MAMBA, '7.29 B', {'M': 64}, GATE, id='Codestral-Mamba-7B'),
    pytest.param(BAMBA_9B, '9.78 B', {'M': 29, '*': 3, '-': 32}, '', id='Bamba-9B'),
  ],
)
def test_published_models_have_their_published_sizes(values, published, layers, note):
  model, notes = read_config_with_notes(values)
  digits = len(published.split()[0].partition('.')[2])
  assert f'{parameter_count(model) / 1e9:.{digits}f} B' == published
  assert {kind: model.layers.count(kind) for kind in layers} == layers and set(model.layers) == set(layers)
  assert len(notes) == bool(note) and all(line.startswith(note) for line in notes)
  assert same_function(write_config(model, 4096), model)


def test_what_else_published_files_say():
  assert read_config_with_notes(LLAMA_31_8B)[0].rope_scaling.length == 8192
  bamba = read_config_with_notes(BAMBA_9B)[0]
  assert (bamba.rope_fraction, bamba.pattern[18:20]) == (0.5, '*-')


@pytest.mark.parametrize(
  ('values', 'says'),
  [
    pytest.param(LLAMA_3_8B | {'rope_scaling': {'rope_type': 'dynamic', 'factor': 4.0}}, "rope_scaling.rope_type: 'dynamic'", id='dynamic'),
    pytest.param(LLAMA_3_8B | {'model_type': 'mistral', 'sliding_window': 4096}, "model_type: 'mistral'", id='Mistral-7B'),
    pytest.param(NEMOTRON_H_8B | {'hybrid_override_pattern': 'MEM*E'}, 'no experts, E', id='Nemotron-3-Nano'),
    pytest.param({'d_model': 2560, 'n_layer': 64, 'ssm_cfg': {'layer': 'Mamba2'}}, 'model_type: None', id='state-spaces/mamba2-2.7b'),
    pytest.param(MAMBA2_27B | {'rms_norm': False}, 'rms_norm: False', id='LayerNorm'),
    pytest.param(BAMBA_9B | {'model_type': 'granitemoehybrid'}, "model_type: 'granitemoehybrid'", id='Granite-4'),
    pytest.param(LLAMA_3_8B | {'quantization_config': {'quant_method': 'fp8'}}, 'quantization_config: ', id='fp8'),
  ],
)
def test_what_cannot_be_supported_is_refused_by_name(values, says):
  with pytest.raises(ConfigError, match=says.replace('(', '.')):
    read_config_with_notes(values)
