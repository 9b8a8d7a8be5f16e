"""Chat templates of the forms that families of models have, in our own words.

What a family's own decides is kept: how roles are marked, which token ends a turn, whether BOS is written,
whether white space is trimmed, and what is refused. Each is a Jinja template for `tokenizer.chat_template`.
"""

from __future__ import annotations

_REFUSE_SYSTEM = (
    "{%- if messages[0]['role'] == 'system' -%}{{ raise_exception('no system message here') }}{%- endif -%}"
)
_ALTERNATE = (
    "{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}"
    "{{ raise_exception('user and assistant must take turns') }}{%- endif -%}"
)

CHATML = (
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
)
"""Qwen2, SmolLM and OLMo 3: the same for every role."""

QWEN25 = (
    "{%- if messages[0]['role'] != 'system' -%}{{ '<|im_start|>system\\nAnswer.<|im_end|>\\n' }}{%- endif -%}"
    + CHATML
)
"""Qwen2.5: a system message of its own where there is none."""

QWEN3 = (
    "{%- for message in messages -%}"
    "{%- set content = message['content'] -%}"
    "{%- if message['role'] == 'assistant' and not loop.last and '</think>' in content -%}"
    "{%- set content = content.split('</think>')[-1].lstrip('\\n') -%}"
    "{%- endif -%}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{%- if message['role'] == 'assistant' and loop.last and '</think>' not in content -%}"
    "{{ '<think>\\n\\n</think>\\n\\n' }}"
    "{%- endif -%}"
    "{{ content + '<|im_end|>\\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and not enable_thinking -%}{{ '<think>\\n\\n</think>\\n\\n' }}"
    "{%- endif -%}{%- endif -%}"
)
"""Qwen3: an empty thought before the last answer, and the thoughts of earlier ones left out."""

LLAMA3 = (
    "{{ bos_token }}"
    "{%- for message in messages -%}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim "
    "+ '<|eot_id|>' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif -%}"
)
"""Llama-3: writes BOS, which the tokenizer adds to texts as well."""

LLAMA4 = (
    LLAMA3.replace("start_header_id", "header_start")
    .replace("end_header_id", "header_end")
    .replace("eot_id", "eot")
)
"""Llama-4: as Llama-3 with other names."""

LLAMA2 = (
    "{%- set system = '' -%}"
    "{%- if messages[0]['role'] == 'system' -%}"
    "{%- set system = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' -%}"
    "{%- set messages = messages[1:] -%}"
    "{%- endif -%}"
    "{%- for message in messages -%}" + _ALTERNATE + "{%- if message['role'] == 'user' -%}"
    "{{ bos_token + '[INST] ' + (system if loop.first else '') + message['content'] | trim + ' [/INST]' }}"
    "{%- else -%}{{ ' ' + message['content'] | trim + ' ' + eos_token }}{%- endif -%}"
    "{%- endfor -%}"
)
"""Llama-2: BOS before every user's turn, spaces around the answer, and no generation prompt."""

MISTRAL = (
    "{{ bos_token }}{%- for message in messages -%}" + _ALTERNATE + "{%- if message['role'] == 'user' -%}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{%- else -%}{{ ' ' + message['content'] + eos_token }}{%- endif -%}"
    "{%- endfor -%}"
)
"""Mistral and Mixtral: BOS once; the roles must alternate."""

GEMMA = (
    "{{ bos_token }}" + _REFUSE_SYSTEM + "{%- for message in messages -%}" + _ALTERNATE + "{%- set role = "
    "'model' if message['role'] == 'assistant' else message['role'] -%}"
    "{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<start_of_turn>model\\n' }}{%- endif -%}"
)
"""Gemma 1 and 2: refuses a system message; the assistant is called `model`."""

GEMMA3 = (
    GEMMA.replace(_REFUSE_SYSTEM, "")
    .replace(
        "{%- for message in messages -%}",
        "{%- set start = 1 if messages[0]['role'] == 'system' else 0 -%}"
        "{%- set opening = messages[0]['content'] + '\\n\\n' if start else '' -%}"
        "{%- for message in messages[start:] -%}",
    )
    .replace("+ message['content'] | trim", "+ (opening if loop.first else '') + message['content'] | trim")
)
"""Gemma 3 and 3n: the system message opens the first user's turn."""

PHI3 = (
    "{%- for message in messages -%}"
    "{{ '<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|assistant|>\\n' }}{%- else -%}{{ eos_token }}{%- endif -%}"
)
"""Phi-3 and PhiMoE: `<|end|>` ends a turn, and eos the dialogue where nothing is to follow."""

PHI4 = (
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + message['role'] + '<|im_sep|>' + message['content'] + '<|im_end|>' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant<|im_sep|>' }}{%- endif -%}"
)
"""Phi-4: no line breaks."""

ZEPHYR = (
    "{%- for message in messages -%}"
    "{{ '<|' + message['role'] + '|>\\n' + message['content'] + eos_token + '\\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|assistant|>\\n' }}{%- endif -%}"
)
"""StableLM's and Zephyr's: roles are plain text, eos ends a turn."""

OLMO2 = (
    "{{ bos_token }}{%- for message in messages -%}"
    "{{ '<|' + message['role'] + '|>\\n' + message['content'] }}"
    "{%- if message['role'] != 'assistant' -%}{{ '\\n' }}"
    "{%- elif loop.last -%}{{ eos_token }}{%- else -%}{{ eos_token + '\\n' }}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|assistant|>\\n' }}{%- endif -%}"
)
"""OLMo 2 and Tulu 3: BOS is the eos token; user turns are not ended."""

GLM4 = (
    "{{ '[gMASK]<sop>' }}{%- for message in messages -%}"
    "{{ '<|' + message['role'] + '|>\\n' + message['content'] }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|assistant|>\\n' }}{%- endif -%}"
)
"""GLM-4: a turn ends where the next one's role begins."""

COHERE = (
    "{{ bos_token }}{%- for message in messages -%}"
    "{%- set role = 'CHATBOT' if message['role'] == 'assistant' else message['role'] | upper -%}"
    "{{ '<|START_OF_TURN_TOKEN|><|' + role + '_TOKEN|>' + message['content'] + '<|END_OF_TURN_TOKEN|>' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{%- endif -%}"
)
"""Command R: roles are tokens."""

HARMONY = (
    "{{ '<|start|>system<|message|>Answer.<|end|>' }}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'assistant' -%}"
    "{{ '<|start|>assistant<|channel|>final<|message|>' + message['content'] }}"
    "{{ '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}"
    "{%- else -%}"
    "{{ '<|start|>' + message['role'] + '<|message|>' + message['content'] + '<|end|>' }}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|start|>assistant' }}{%- endif -%}"
)
"""gpt-oss: the last answer ends by another token than earlier ones, and the policy chooses its channel."""

GRANITE = (
    "{%- for message in messages -%}"
    "{{ '<|start_of_role|>' + message['role'] + '<|end_of_role|>' + message['content'] "
    "+ '<|end_of_text|>\\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|start_of_role|>assistant<|end_of_role|>' }}{%- endif -%}"
)
"""Granite 3: the eos token ends every turn."""

DEEPSEEK = (
    "{{ bos_token }}{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}{{ '<|User|>' + message['content'] }}"
    "{%- elif message['role'] == 'assistant' -%}"
    "{{ '<|Assistant|>' + message['content'] + '<|end▁of▁sentence|>' }}"
    "{%- else -%}{{ message['content'] }}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|Assistant|>' }}{%- endif -%}"
).replace("|", "\uff5c")
"""DeepSeek-V3: a system message is the text before the first turn."""

FALCON = (
    "{%- for message in messages -%}"
    "{{ message['role'] | capitalize + ': ' + message['content'] }}"
    "{{ eos_token if message['role'] == 'assistant' else '\\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ 'Assistant:' }}{%- endif -%}"
)
"""Falcon's: plain text, and eos behind an answer."""

BLENDERBOT = (
    "{%- for message in messages -%}"
    "{{ (' ' if message['role'] == 'user' else '') + message['content'] + ('' if loop.last else '  ') }}"
    "{%- endfor -%}{{ eos_token }}"
)
"""Blenderbot: two spaces between turns, and eos behind the last, which the encoder reads."""
