"""What the shipped workflows consist of: nodes, values, links, steps and notes. Data only, for build.py.

Each workflow has a name here, by which its twin in tests/workflows, its nano version in demo/workflows and its lasting
id are found, and a file name, which the template browser shows as its title: see FILES.
"""

from __future__ import annotations

FILES = {
    "first_steps_with_nano": "first steps with nano",
    "text_to_image": "text to image",
    "edit": "edit a picture",
    "ask_about_a_picture": "ask about a picture",
    "chat": "chat",
    "think_then_draw": "think, then draw",
    "think_then_edit": "think, then edit",
    "edit_the_thought_then_draw": "edit the thought, then draw",
    "masked_edit": "edit a painted part",
    "edit_two_references": "edit with two pictures",
    "compare_two_pictures": "compare two pictures",
    "picture_to_picture": "image to image",
    "draw_ask_draw_again": "draw, ask, draw again",
    "draw_judge_draw_again": "draw, judge, draw again",
    "story_in_three_pictures": "story in three pictures",
    "batch_of_prompts": "batch of prompts",
    "grid_of_scales": "grid of scales",
    "regions": "regions",
    "hires_second_pass": "hires second pass",
    "upscale_with_a_model": "upscale with a model",
    "with_a_lora": "LoRA",
    "train_a_lora": "train a LoRA",
    "load_a_trained_lora": "load a trained LoRA",
    "control_with_edges": "control with edges",
    "controlnet_of_another_model": "ControlNet of another model",
    "two_gpus": "two GPUs",
    "captions_for_a_folder": "captions for a folder",
    "text_to_image_custom_sampling": "text to image, custom sampling",
    "text_to_image_ksampler": "text to image, KSampler",
}
"""The workflows in the order of the documents: name, and what its file is called after "InternVL-U "."""

WANTS = {"train_a_lora": "0.33.0", "two_gpus": "0.33.0"}
"""The oldest ComfyUI for a workflow, where that is not the pack's own oldest: before, nodes differ or are missing."""

NEWER = {"MultiGPU_WorkUnits"}
"""ComfyUI's nodes, of workflows in WANTS, that the pack's oldest ComfyUI has not."""


def runs_on(name: str, version: str) -> bool:
    """Returns whether a workflow runs on a version of ComfyUI, such as 0.33.0."""
    oldest, own = ([int(number) for number in one.split(".")] for one in (WANTS.get(name, "0"), version))
    return own >= oldest


def file_name(name: str) -> str:
    """Returns the file name of a workflow without its ending: the title of its card."""
    return f"InternVL-U {FILES[name]}"


# Notes: three lines on what to change, and the official values. The nodes to change first are green.

MODEL = """**No model yet?** Choose the **download** in **Load InternVL-U** and run. Or put the whole folder from \
[Hugging Face](https://huggingface.co/InternVL-U/InternVL-U) or \
[ModelScope](https://modelscope.cn/models/OpenGVLab/InternVL-U) into **models/InternVL-U/InternVL-U** and press \
**R**."""
NANO_MODEL = """**What is nano?** A tiny model in the pack, 12 MB. It knows flat shapes (circle, square, triangle, \
star, cross, ring) in eight colours on plain backgrounds, and draws 64 x 64 pixels, here shown at 256. All nodes work \
with it.

**How to go on**: open **InternVL-U text to image**, the same graph for the real model. Where that is missing, \
the page says so and offers the download of 8.2 GB."""
TRAIN_MODEL = """**Wants ComfyUI 0.33** or newer. It trains **nano**, the tiny model in the pack, which has never seen \
a heart: two minutes on two cores, nothing is downloaded.

**The real model**: choose it in **Load InternVL-U**, your own folder, **training_dtype** bf16, \
**gradient_checkpointing** on, **checkpoint_depth** 2, **batch_size** 1, and a size to draw. fp8 and int8 files can be \
trained on too; GGUF files cannot."""
TRAINED_MODEL = """**What for?** The file that **train a LoRA** saved, with ComfyUI's own loader. It is for **nano**, \
the tiny model in the pack: a LoRA fits the model that it was trained on.

**For the real model**: choose it in **Load InternVL-U**, and a LoRA that was trained on it. **Load InternVL-U LoRA** \
knows more trainers' names, and the language model's half."""
CONTROL_MODEL = """**What for?** The edges say where things are, the words what they are. **nano**, the tiny model in \
the pack, has learnt that from 600 pictures; its LoRA comes with it, and nothing is downloaded.

**For the real model**: `python -m internvl_u pairs` and `train` make such a LoRA of your own pictures \
(docs/training.md). Canny's thresholds are those it was trained with."""
WORDS = "**Prompt**: what you want to see, in English or Chinese."
CHANGES = "**Prompt**: what to change, in English or Chinese."
SIZE = "**Size**: width and height, 512 to 1024."
SEED = "**seed** in the sampler: another number, another picture."
PICTURE = "**Load Image**: your picture."
EDIT_VALUES = """Official values: **steps** 20, **prompt cfg** 4.5, **picture cfg** 2.0. A higher **prompt cfg** \
follows the words more closely, a higher **picture cfg** the picture."""
DRAW_VALUES = """Official values: **steps** 20, **prompt cfg** 4.5. A higher **prompt cfg** follows the words more \
closely; **picture cfg** counts only with pictures."""
SCALES = """**scales** automatic takes the official values: after a thought **prompt cfg** 3.5 and **picture cfg** \
1.5, without one 4.5 and 2.0."""
THINK_VALUES = f"""**think** off: the same graph draws without a thought. **budget**: *official* is 200 tokens, *long* \
1024. {SCALES}"""
ANSWER_VALUES = "Official values: **max_new_tokens** 512, **greedy**: the same question gets the same answer."

NOTES = {
    "first_steps_with_nano": (
        [
            "Press **Run**: a picture comes within seconds.",
            "**Prompt**: try *three pink stars on a navy background*.",
            SEED,
        ],
        "Nothing is downloaded. **steps** 20 and **prompt cfg** 4.5 are the official values of both models.",
    ),
    "text_to_image": ([WORDS, SIZE, SEED], DRAW_VALUES),
    "text_to_image_custom_sampling": (
        [WORDS, SIZE, "Guider, solver, scheduler and noise are nodes of their own: exchange any of them."],
        "As they are, they draw what **InternVL-U Sampler** draws. **VAE Decode** works like **InternVL-U Decode**, "
        "half a level of 255 darker.",
    ),
    "text_to_image_ksampler": (
        [WORDS, SIZE, SEED],
        "Typical values: **steps** 20, **cfg** 4.5 (it is all_cfg), **euler**, **simple**. For the official solver and "
        "schedule take **InternVL-U Sampler**.",
    ),
    "edit": (
        [PICTURE, CHANGES, SEED],
        f"The result has the picture's size, brought into the trained range. For another one connect **Empty "
        f"InternVL-U Latent** to the sampler.\n\n{EDIT_VALUES}",
    ),
    "edit_two_references": (
        [
            "**Load Image 1** and **2**: your pictures.",
            f"{CHANGES} Each **\\<image\\>** is one picture, in order.",
            SEED,
        ],
        f"The result has the size of **image1**. The official code takes one picture only: try what works.\n\n"
        f"{EDIT_VALUES}",
    ),
    "think_then_draw": (
        ["**Prompt**: a riddle will do. The thought appears on **InternVL-U Think**.", SIZE, SEED],
        THINK_VALUES,
    ),
    "edit_the_thought_then_draw": (
        [
            "**Prompt**: write and run. A thought appears on **InternVL-U Think**.",
            "**Copy** it there, paste it into **Thought to draw from**, change it.",
            "Run again: only the picture is made anew.",
        ],
        "The picture is always drawn from the text in the green box: empty it to draw plainly. **budget**: *official* "
        f"is 200 tokens, *long* 1024. {SCALES}",
    ),
    "think_then_edit": (
        [PICTURE, "**Prompt**: what to change. The thought appears on **InternVL-U Think**.", SEED],
        THINK_VALUES,
    ),
    "ask_about_a_picture": (
        [PICTURE, "**question**: in English or Chinese.", "**how**: sampling for an answer that differs each time."],
        f"The answer appears on the node while it is written. **Preview as Text** stands for whatever you do with it "
        f"next.\n\n{ANSWER_VALUES}",
    ),
    "chat": (
        [
            "**message**: what you say; then **Send**, or run.",
            "**action**: what it is to do: answer, draw, edit the last picture, think first.",
            "**Load Image**: a picture to talk about, or bypass the node.",
        ],
        "The box keeps the conversation, also in the saved workflow. **reads**: how much of it the model is given. Its "
        "pictures are in **output/InternVL-U/chat**, and the newest one goes on to **IMAGE**.",
    ),
    "compare_two_pictures": (
        [
            "**Load Image 1** and **2**: your pictures.",
            "**question**: in English or Chinese.",
            "More pictures: connect further inputs. A batch counts as several.",
        ],
        "**\\<image\\>** in the question marks the place of a picture; without marks all come first.\n\n"
        f"{ANSWER_VALUES}",
    ),
    "masked_edit": (
        [
            "**Load Image**: your picture. Right click, **Open in MaskEditor**, and paint over what may change.",
            CHANGES,
            SEED,
        ],
        f"What is not painted stays as it was, to the pixel. The example's scarf is painted. The official pipeline has "
        f"no masks.\n\n{EDIT_VALUES}",
    ),
    "draw_ask_draw_again": (
        [WORDS, "**question**: what the model is to say of its picture. It draws the answer.", SIZE],
        DRAW_VALUES,
    ),
    "draw_judge_draw_again": (
        [
            WORDS,
            "**question**: what must be true of the picture, answered by yes or no.",
            "**seed** of each sampler: one for each try.",
        ],
        "Where the first picture is right, only that one is drawn. Else the second is, and the third goes on as it is. "
        f"Ask for what can be seen or counted.\n\n{DRAW_VALUES}",
    ),
    "story_in_three_pictures": (
        [
            "**Prompt** of step 2: the first picture.",
            "**Prompt 2**, **Prompt 3**: what happens next.",
            "**seed** of each sampler: another number, another picture.",
        ],
        "Each picture is looked at, thought over, and changed into the next one. For a longer story copy the last step."
        f"\n\n{THINK_VALUES}",
    ),
    "batch_of_prompts": (
        [
            "**text**: one prompt a line.",
            SIZE,
            "Or a table: the first line names its columns, **prompt,name,seed**.",
        ],
        "All are drawn in one run, and saved when the last is there. Each file has the name of its prompt. Without a "
        f"column the seeds are 0, 1, 2.\n\n{DRAW_VALUES}",
    ),
    "grid_of_scales": (
        [PICTURE, CHANGES, "**all_cfg**, **part_cfg** in the green box: the numbers to compare."],
        "A column for each **all_cfg**, a row for each **part_cfg**: four pictures as it comes. A higher **all_cfg** "
        "follows the words more closely, a higher **part_cfg** the picture. Without a picture **part_cfg** changes "
        "nothing.",
    ),
    "regions": (
        [
            "**Left**, **Right**: what is to be seen in each half.",
            "**x**, **width** in step 3: where, as parts of the whole.",
            SIZE,
        ],
        "Each part is a picture of its own, laid into the whole. For a third one add **InternVL-U Encode**, **Set "
        "Area** and **Combine**. For edits take **Conditioning (Set Mask)**.",
    ),
    "picture_to_picture": (
        [PICTURE, "**Prompt**: the whole new picture in words. It is no instruction.", "**denoise**: how much is new."],
        "**denoise** 0.6 keeps the rough layout, 0.3 most of the picture, 1.0 nothing. **steps** 20, **prompt cfg** "
        "4.5 as usual. The official pipeline always starts from noise; to change one thing take **edit a picture**.",
    ),
    "hires_second_pass": (
        [WORDS, "**scale_by**: how much larger the second picture is.", "**denoise** of step 5: how much is new."],
        "The first picture's latent is enlarged and drawn once more on top. **denoise** 0.5 keeps the scene and adds "
        "detail. Above 1024 x 1024 the model was not trained: at 1.5 the first size should be 768 or less.",
    ),
    "upscale_with_a_model": (
        [WORDS, "**model_name** in step 5: any upscale model.", SEED],
        "Upscale models go into **models/upscale_models**, for instance [RealESRGAN_x4plus]"
        "(https://huggingface.co/Comfy-Org/Real-ESRGAN_repackaged). They know nothing of the prompt.",
    ),
    "with_a_lora": (
        [
            "**lora_name**: your file, of **models/loras**.",
            "**strength_model**, **strength_mllm**: 1 as trained, 0 not at all.",
            WORDS,
        ],
        f"What of the file fits is shown on the node. Several such nodes in a row add up.\n\n{DRAW_VALUES}",
    ),
    "train_a_lora": (
        [
            "Press **Run**: 20 hearts are learnt, beside known shapes. Then one is drawn.",
            "**folder**: your pictures, each with a **.txt**, in ComfyUI's **input**.",
            "**steps**, **learning_rate**: how long, how strongly.",
        ],
        "The LoRA lies in **output/loras**: press **R**, and **load a trained LoRA** finds it. **existing_lora** goes "
        "on with one.",
    ),
    "load_a_trained_lora": (
        [
            "**lora_name**: your file, of **models/loras** or **output/loras**.",
            "**strength_model**: 1 as trained, 0 not at all.",
            "**Prompt**: what you want to see, with the words that were trained.",
        ],
        DRAW_VALUES,
    ),
    "control_with_edges": (
        [
            "**Load Image**: a plain shape, 64 x 64 pixels.",
            "**Prompt**: after *Draw from this edge map:*, the shape in any colours.",
            "**scale_by**: how much larger the picture is saved.",
        ],
        "**Upscale Image By** wants no file; **Upscale Image (using Model)** in its place wants one. For another "
        "model's ControlNet take **ControlNet of another model**.",
    ),
    "controlnet_of_another_model": (
        [WORDS, "**Checkpoint** and **ControlNet** in step 5: models of one family.", "**Text** in step 6."],
        "InternVL-U composes the scene, its lines lead the other model. As it comes: any Stable Diffusion 1.5 "
        "checkpoint and its [Canny ControlNet](https://huggingface.co/Comfy-Org/ControlNet-v1-1_fp16_safetensors).",
    ),
    "two_gpus": (
        [
            "**max_gpus**: how many share each step of a picture; an edit has work for three.",
            "**device**: where the language model is, which reads and thinks: **gpu:1** is the second GPU.",
            WORDS,
        ],
        "**Wants ComfyUI 0.33** or newer. With one GPU it runs as well, and nothing is shared. Two cards of one kind "
        "share best: each waits for the other at every step. **Select VAE Device** does for the VAE what step 2 does.",
    ),
    "captions_for_a_folder": (
        [
            "**folder**: a folder with pictures in ComfyUI's **input**.",
            "**question**: what the captions say, and how long.",
            "**folder_name**: where in **output** pictures and .txt files go.",
        ],
        "One picture after the other is read; each .txt has the picture's name, as trainers expect.\n\n"
        f"{ANSWER_VALUES}",
    ),
}
"""Per workflow: the three lines on what to change, and the rest."""
OWN_MODELS = {
    "first_steps_with_nano": NANO_MODEL,
    "train_a_lora": TRAIN_MODEL,
    "load_a_trained_lora": TRAINED_MODEL,
    "control_with_edges": CONTROL_MODEL,
}
"""What a note says of the model, where that is nano."""


def note(name: str) -> str:
    """Returns what a workflow's note says."""
    lines, rest = NOTES[name]
    steps = "\n".join(f"### {number}. {line}" for number, line in enumerate(lines, 1))
    model = OWN_MODELS.get(name, MODEL)
    return f"## {file_name(name)}\n\n{steps}\n\n{model}\n\n{rest}\n"


NANO_CHOICE = "nano InternVL-U (in the box: flat shapes, 64 x 64 pixels)"
"""What Load InternVL-U calls the nano model: internvl_u/defaults.py."""
NANO_EDGES = "internvl_u_nano_edges.safetensors"
"""The LoRA that comes with it, for edge maps: internvl_u/defaults.py."""
PROMPT = "a red fox reading a newspaper in a sunny kitchen, watercolour"
RIDDLE = "the fruit that fell on Newton's head, as a still life in oils"
THOUGHT = (
    "The fruit of the story is an apple. The picture shows one ripe red apple on a worn wooden table, seen from "
    "slightly above. Light falls from a window on the left and leaves a soft shadow on the right. The background is "
    "plain and dark, and the brushwork is visible, as in a classical still life in oils."
)
BETTER = (
    "Describe this picture in one paragraph as it should look if it were better: name the subject, what is around it, "
    "the light, the colours and the style, and improve what is plain or wrong. Write the description only."
)
STORY = (
    "a small red boat with a white sail on a calm lake at sunrise, picture book illustration",
    "a storm comes up: dark clouds, high waves, the sail torn",
    "the boat reaches a lighthouse at night, the sea is calm again",
)
BATCH = (
    "a lighthouse on a cliff at dusk, watercolour\na lighthouse on a cliff in a snow storm, watercolour\n"
    "a lighthouse on a cliff on a summer morning, watercolour"
)
CAPTION = "Describe this picture in one sentence for training an image model: subject, surroundings, light, style."

# Pictures of our own, see pictures.py.
HARBOUR, EVENING = "internvl_u_harbour.jpg", "internvl_u_harbour_evening.jpg"
CAT, CAT_MASKED = "internvl_u_cat.jpg", "internvl_u_cat_masked.png"
SHAPE = "internvl_u_shape.png"
PICTURES = "internvl_u_pictures"
HEARTS = "internvl_u_hearts"
TRAINED = "internvl_u_heart"
"""What the LoRA of the training workflow is called, before its steps and number."""

FIXED = {"control_after_generate": "fixed"}
STEPS = {"steps": 20, "denoise": 1.0}
GUIDANCE = {"all_cfg": 4.5, "part_cfg": 2.0, "scales": "automatic"}
SAMPLER = FIXED | {"seed": 1234} | STEPS | GUIDANCE
KSAMPLER = FIXED | {"seed": 1234} | STEPS | {"cfg": 4.5, "sampler_name": "euler", "scheduler": "simple"}
SD_SAMPLER = FIXED | {"seed": 1234, "steps": 25, "cfg": 6.0, "sampler_name": "dpmpp_2m", "scheduler": "karras"}
SD_SAMPLER |= {"denoise": 1.0}
WRITING = FIXED | {"how": "greedy", "seed": 1234}
SCALE = {"upscale_method": "lanczos", "largest_size": 1024}

LOAD = ("load", "InternVLU_LoadModel", {"model_name": "InternVL-U", "precision": "auto"})
LATENT_SIZE = {"preset": "custom", "width": 1024, "height": 1024, "batch_size": 1}
LATENT = ("latent", "InternVLU_CreateLatent", LATENT_SIZE)
SAMPLE = ("sample", "InternVLU_SampleLatent", SAMPLER)
DECODE = ("decode", "InternVLU_DecodeLatent", {"width": 0, "height": 0})
VAE_DECODE = ("decode", "VAEDecode", {})
SAVE = ("save", "SaveImage", {"filename_prefix": "InternVL-U"})
LORA_STRENGTHS = {"strength_model": 1.0, "strength_mllm": 1.0}
LORA = ("lora", "InternVLU_LoadLoRA", {"lora_name": "your_lora.safetensors"} | LORA_STRENGTHS)
SPLIT = ("split", "MultiGPU_WorkUnits", {"max_gpus": 2})
DEVICE = ("device", "InternVLU_SelectMLLMDevice", {"device": "gpu:1"})


def image(file: str = HARBOUR, name: str = "image") -> tuple:
    return (name, "LoadImage", {"image": file})


def encode(prompt: str = "", name: str = "encode") -> tuple:
    return (name, "InternVLU_EncodePrompt", {"prompt": prompt})


def text(name: str, value: str) -> tuple:
    return (name, "PrimitiveStringMultiline", {"value": value})


def answer(question: str) -> tuple:
    return ("answer", "InternVLU_AnswerQuestion", WRITING | {"question": question, "max_new_tokens": 512})


def think(name: str = "think") -> tuple:
    values = {"max_new_tokens": 200, "think": True, "budget": "custom"}
    return (name, "InternVLU_WriteThought", WRITING | values)


def sample(name: str = "sample", seed: int = 1234) -> tuple:
    return (name, "InternVLU_SampleLatent", SAMPLER | {"seed": seed})


def decode(name: str = "decode") -> tuple:
    return (name, "InternVLU_DecodeLatent", {"width": 0, "height": 0})


def judge(name: str) -> tuple:
    return (name, "InternVLU_JudgePicture", {})


def told(number: str) -> tuple:
    """Returns the step of a story's later picture; the first one's is as that of each graph."""
    nodes = [
        [text(f"prompt{number}", STORY[int(number) - 1])],
        [encode("", f"encode{number}"), think(f"think{number}")],
    ]
    save = (f"save{number}", "SaveImage", {"filename_prefix": f"InternVL-U_story_{number}"})
    return (
        f"Picture {number}",
        [*nodes, [sample(f"sample{number}", 1233 + int(number))], [decode(f"decode{number}"), save]],
    )


def area(name: str, x: float) -> tuple:
    return (name, "ConditioningSetAreaPercentage", {"width": 0.5, "height": 1.0, "x": x, "y": 0.0, "strength": 1.0})


THINK = think()


def again(denoise: float = 1.0) -> list[list[tuple]]:
    sample = ("sample2", "InternVLU_SampleLatent", SAMPLER | {"denoise": denoise})
    decode = ("decode2", "InternVLU_DecodeLatent", {"width": 0, "height": 0})
    return [[sample], [decode, ("save2", "SaveImage", {"filename_prefix": "InternVL-U_again"})]]


# Steps from left to right: (title, columns of nodes); a list of steps is a column of steps, from top to bottom. A node
# is (name, type, values). Ids follow this order; the note comes last, and stands on the left.
DRAW = ("Draw", [[SAMPLE], [DECODE], [SAVE]])
LOADED = ("Model", [[LOAD]])
SIZED = ("Size", [[LATENT]])


def worded(prompt: str) -> tuple:
    return ("Prompt", [[encode(prompt)]])


NANO_LATENT = ("latent", "InternVLU_CreateLatent", LATENT_SIZE | {"width": 64, "height": 64})

NANO_LOADED = ("Model", [[("load", "InternVLU_LoadModel", {"model_name": NANO_CHOICE, "precision": "auto"})]])
LARGER = ("decode", "InternVLU_DecodeLatent", {"width": 256, "height": 256})
NANO_DRAW = ("Draw", [[SAMPLE], [LARGER], [SAVE]])
TRAINING = {"batch_size": 8, "grad_accumulation_steps": 1, "steps": 500, "learning_rate": 0.003, "rank": 32}
TRAINING |= {"optimizer": "AdamW", "loss_function": "L1", "training_dtype": "fp32", "lora_dtype": "fp32"}
TRAINING |= FIXED | {"seed": 0, "algorithm": "LoRA", "gradient_checkpointing": False}

STEPS_OF = {
    "first_steps_with_nano": [
        NANO_LOADED,
        [worded("a red circle to the left of a blue square"), ("Size", [[NANO_LATENT]])],
        NANO_DRAW,
    ],
    "text_to_image": [LOADED, [worded(PROMPT), SIZED], DRAW],
    "text_to_image_custom_sampling": [
        LOADED,
        [worded(PROMPT), SIZED],
        (
            "Settings",
            [
                [
                    ("noise", "RandomNoise", FIXED | {"noise_seed": 1234}),
                    ("guider", "InternVLU_CreateGuider", GUIDANCE),
                    ("solver", "InternVLU_SelectSampler", {}),
                    ("steps", "InternVLU_ScheduleSteps", STEPS),
                ]
            ],
        ),
        ("Draw", [[("sample", "SamplerCustomAdvanced", {})], [VAE_DECODE], [SAVE]]),
    ],
    "text_to_image_ksampler": [
        LOADED,
        [worded(PROMPT), SIZED],
        ("Draw", [[("sample", "KSampler", KSAMPLER)], [VAE_DECODE], [SAVE]]),
    ],
    "edit": [[LOADED, ("Picture", [[image()]])], worded("make it a winter evening with snow and lit windows"), DRAW],
    "edit_two_references": [
        [LOADED, ("Pictures", [[image(CAT, "image1"), image(HARBOUR, "image2")]])],
        worded("let the cat of <image> stand on the jetty of <image>"),
        DRAW,
    ],
    "think_then_draw": [
        [LOADED, ("Prompt", [[text("prompt", RIDDLE)]])],
        ("Think", [[THINK]]),
        [("Read", [[encode()]]), SIZED],
        DRAW,
    ],
    "edit_the_thought_then_draw": [
        [LOADED, ("Prompt", [[text("prompt", RIDDLE)]])],
        ("Think", [[THINK]]),
        [("Thought", [[text("thought", THOUGHT)]]), SIZED],
        ("Draw", [[encode()], [SAMPLE], [DECODE, SAVE]]),
    ],
    "think_then_edit": [
        [
            LOADED,
            ("Prompt and picture", [[text("prompt", "show the same place in the season after autumn"), image()]]),
        ],
        ("Think", [[THINK]]),
        ("Read", [[encode()]]),
        DRAW,
    ],
    "ask_about_a_picture": [
        [LOADED, ("Picture", [[image()]])],
        ("Question", [[answer("Describe this picture in detail.")]]),
        ("Answer", [[("preview", "PreviewAny", {})]]),
    ],
    "compare_two_pictures": [
        [LOADED, ("Pictures", [[image(HARBOUR, "image1"), image(EVENING, "image2")]])],
        ("Question", [[answer("What is different between these two pictures, and what is the same?")]]),
        ("Answer", [[("preview", "PreviewAny", {})]]),
    ],
    "chat": [
        [LOADED, ("Picture", [[image()]])],
        (
            "Conversation",
            [
                [
                    (
                        "chat",
                        "InternVLU_Chat",
                        FIXED
                        | {"action": "decide by itself", "reads": "whole conversation", "seed": 1234}
                        | {"message": "What do you see here, and what would it look like in winter?"},
                    )
                ]
            ],
        ),
        ("Newest picture", [[("shown", "PreviewImage", {})]]),
    ],
    "draw_judge_draw_again": [
        [
            LOADED,
            worded("a red fox with a blue scarf to the left of a yellow umbrella, watercolour"),
            ("Question", [[text("question", "Is there a fox with a blue scarf to the left of a yellow umbrella?")]]),
        ],
        ("Draw up to three times", [[sample()], [sample("sample2", 1235)], [sample("sample3", 1236)]]),
        ("Judge", [[DECODE, decode("decode2"), decode("decode3")], [judge("judge2")], [judge("judge1")]]),
        ("The right one", [[SAVE]]),
    ],
    "story_in_three_pictures": [
        LOADED,
        (
            "Picture 1",
            [
                [text("prompt", STORY[0])],
                [encode(), THINK],
                [SAMPLE],
                [DECODE, ("save", "SaveImage", {"filename_prefix": "InternVL-U_story_1"})],
            ],
        ),
        told("2"),
        told("3"),
    ],
    "batch_of_prompts": [
        [LOADED, ("Prompts", [[("prompts", "InternVLU_ListPrompts", {"text": BATCH})]])],
        [("Read", [[encode()]]), SIZED],
        DRAW,
    ],
    "grid_of_scales": [
        [LOADED, ("Picture", [[image()]])],
        [
            worded("make it a winter evening with snow and lit windows"),
            ("Scales", [[("scales", "InternVLU_ListScales", {"all_cfg": "2.5, 4.5", "part_cfg": "1, 2"})]]),
        ],
        ("Draw each", [[SAMPLE], [DECODE]]),
        (
            "Grid",
            [
                [("grid", "ImageGrid", {"cell_width": 512, "cell_height": 512, "padding": 8})],
                [("save", "SaveImage", {"filename_prefix": "InternVL-U_grid"})],
            ],
        ),
    ],
    "regions": [
        [LOADED, SIZED],
        (
            "What",
            [
                [
                    encode("a red fox sitting in fresh snow, watercolour", "left"),
                    encode("a grey wolf sitting in autumn leaves, watercolour", "right"),
                ]
            ],
        ),
        (
            "Where",
            [
                [area("left_area", 0.0), area("right_area", 0.5), ("both", "ConditioningCombine", {})],
            ],
        ),
        DRAW,
    ],
    "masked_edit": [
        [LOADED, ("Picture and mask", [[image(CAT_MASKED)]])],
        (
            "Only the painted part",
            [
                [
                    ("scale", "ImageScaleToMaxDimension", SCALE),
                    ("pixels", "VAEEncode", {}),
                    ("masked", "SetLatentNoiseMask", {}),
                ]
            ],
        ),
        worded("give the cat a blue scarf with white dots"),
        (
            "Draw",
            [
                [SAMPLE],
                [DECODE, ("keep", "ImageCompositeMasked", {"x": 0, "y": 0, "resize_source": True})],
                [SAVE],
            ],
        ),
    ],
    "draw_ask_draw_again": [
        [LOADED, ("Prompt", [[encode(PROMPT)]]), SIZED],
        ("Draw", [[SAMPLE], [DECODE, SAVE]]),
        ("Ask", [[answer(BETTER)]]),
        ("Read", [[encode("", "encode2")]]),
        ("Draw again", again()),
    ],
    "picture_to_picture": [
        [LOADED, ("Picture", [[image()]])],
        ("Start from it", [[("scale", "ImageScaleToMaxDimension", SCALE), ("pixels", "VAEEncode", {})]]),
        worded("an oil painting of a fishing village on a lake, red roofs, tall green hills, summer clouds"),
        ("Draw", [[("sample", "InternVLU_SampleLatent", SAMPLER | {"denoise": 0.6})], [DECODE], [SAVE]]),
    ],
    "hires_second_pass": [
        LOADED,
        [
            worded(PROMPT),
            ("Size", [[("latent", "InternVLU_CreateLatent", LATENT_SIZE | {"width": 768, "height": 768})]]),
        ],
        ("Draw", [[SAMPLE], [DECODE, SAVE]]),
        (
            "Draw larger",
            [
                [("larger", "LatentUpscaleBy", {"upscale_method": "bislerp", "scale_by": 1.5})],
                *again(0.5),
            ],
        ),
    ],
    "upscale_with_a_model": [
        LOADED,
        [worded(PROMPT), SIZED],
        ("Draw", [[SAMPLE], [DECODE]]),
        (
            "Upscale",
            [
                [
                    ("upscaler", "UpscaleModelLoader", {"model_name": "RealESRGAN_x4plus.safetensors"}),
                    ("upscale", "ImageUpscaleWithModel", {}),
                ],
                [SAVE],
            ],
        ),
    ],
    "with_a_lora": [LOADED, ("LoRA", [[LORA]]), [worded(PROMPT), SIZED], DRAW],
    "train_a_lora": [
        [NANO_LOADED, ("Pictures and captions", [[("pairs", "LoadImageTextDataSetFromFolder", {"folder": HEARTS})]])],
        ("Read them", [[encode("", "captions"), ("pixels", "VAEEncode", {})]]),
        ("Train", [[("train", "TrainLoraNode", TRAINING)]]),
        (
            "Keep it",
            [[("keep_lora", "SaveLoRA", {"prefix": f"loras/{TRAINED}"}), ("plot", "LossGraphNode", {})]],
        ),
        [
            ("Put it on", [[("put", "LoraModelLoader", {"strength_model": 1.0})]]),
            worded("a pink heart on a navy background"),
            ("Size", [[NANO_LATENT]]),
        ],
        ("Draw", [[SAMPLE], [LARGER, SAVE]]),
    ],
    "load_a_trained_lora": [
        NANO_LOADED,
        (
            "LoRA",
            [
                [
                    (
                        "lora",
                        "LoraLoaderModelOnly",
                        {"lora_name": f"{TRAINED}_{TRAINING['steps']}_steps_00001_.safetensors", "strength_model": 1.0},
                    )
                ]
            ],
        ),
        [worded("a pink heart on a navy background"), ("Size", [[NANO_LATENT]])],
        NANO_DRAW,
    ],
    "control_with_edges": [
        [NANO_LOADED, ("Picture", [[image(SHAPE)]])],
        [
            (
                "Edges",
                [
                    [
                        ("canny", "Canny", {"low_threshold": 0.05, "high_threshold": 0.1}),
                        ("edges", "PreviewImage", {}),
                    ]
                ],
            ),
        ],
        [
            (
                "LoRA for edges",
                [[("lora", "InternVLU_LoadLoRA", {"lora_name": NANO_EDGES} | LORA_STRENGTHS)]],
            ),
            worded("Draw from this edge map: a red star on a white background"),
        ],
        ("Draw", [[SAMPLE], [DECODE]]),
        ("Upscale", [[("enlarge", "ImageScaleBy", {"upscale_method": "lanczos", "scale_by": 4.0}), SAVE]]),
    ],
    "controlnet_of_another_model": [
        [LOADED, worded("a cottage on a hill beside a tall tree, ink drawing"), SIZED],
        ("Compose", [[SAMPLE], [DECODE, ("lines", "Canny", {"low_threshold": 0.2, "high_threshold": 0.5})]]),
        (
            "Another model",
            [
                [
                    ("checkpoint", "CheckpointLoaderSimple", {"ckpt_name": "v1-5-pruned-emaonly-fp16.safetensors"}),
                    ("control", "ControlNetLoader", {"control_net_name": "control_v11p_sd15_canny_fp16.safetensors"}),
                ],
            ],
        ),
        (
            "Its text",
            [
                [
                    (
                        "positive",
                        "CLIPTextEncode",
                        {"text": "a cottage on a hill beside a tall tree, photo, golden light"},
                    ),
                    ("negative", "CLIPTextEncode", {"text": "blurry, text"}),
                    ("apply", "ControlNetApplyAdvanced", {"strength": 0.8, "start_percent": 0.0, "end_percent": 1.0}),
                    ("size2", "EmptyLatentImage", {"width": 768, "height": 768, "batch_size": 1}),
                ],
            ],
        ),
        ("Draw with it", [[("sample2", "KSampler", SD_SAMPLER)], [("decode2", "VAEDecode", {}), SAVE]]),
    ],
    "two_gpus": [LOADED, ("GPUs", [[SPLIT, DEVICE]]), [worded(PROMPT), SIZED], DRAW],
    "captions_for_a_folder": [
        [LOADED, ("Folder", [[("folder", "LoadImageDataSetFromFolder", {"folder": PICTURES})]])],
        ("Question", [[answer(CAPTION)]]),
        ("Save", [[("save", "SaveImageTextDataSetToFolder", {"folder_name": "captions", "filename_prefix": "image"})]]),
    ],
}


# What newer frontends show of a workflow as an app: the inputs (node.widget ...), and the nodes whose results it shows.
APPS = {
    "text_to_image": ("encode.prompt latent.width latent.height sample.seed", "save"),
    "edit": ("image.image encode.prompt sample.seed", "save"),
    "ask_about_a_picture": ("image.image answer.question preview.preview_markdown answer.live_text", "preview"),
}


def steps(name: str) -> list[list[tuple]]:
    """Returns a workflow's steps, column by column of steps, from left to right."""
    return [step if isinstance(step, list) else [step] for step in STEPS_OF[name]]


def nodes(name: str) -> list[tuple]:
    """Returns a workflow's nodes in the order of their ids, without the note."""
    return [node for column in steps(name) for _, nodes in column for nodes in nodes for node in nodes]


def first(name: str) -> list[str]:
    """Returns the nodes that the user changes first."""
    return [node for node, _, values in nodes(name) if node in FIRST or values.get("prompt")]


# Titles other than the nodes' own, by the names above.
TITLES = {
    "note": "What to change",
    "prompt": "Prompt",
    "thought": "Thought to draw from",
    "image1": "Load Image 1",
    "image2": "Load Image 2",
    "preview": "Preview as Text",
    "scale": "Scale the longer side",
    "keep": "Keep what is not painted",
    "encode2": "Encode the answer",
    "save2": "Save Image, the second",
    "prompt2": "Prompt 2",
    "prompt3": "Prompt 3",
    "question": "Question",
    "think2": "Think 2",
    "think3": "Think 3",
    "encode3": "Encode 3",
    "sample3": "Sampler 3",
    "decode3": "Decode 3",
    "save3": "Save Image 3",
    "shown": "The newest picture",
    "edges": "Edges",
    "judge1": "Judge the first",
    "judge2": "Judge the second",
    "left": "Left",
    "right": "Right",
    "left_area": "Left half",
    "right_area": "Right half",
    "captions": "Encode the captions",
    "keep_lora": "Save the LoRA",
    "plot": "Loss",
    "put": "Put the LoRA on",
    "positive": "Text of the other model",
    "negative": "What it is to avoid",
}
# What is to be changed first is green, and the note brown, as in core's templates: (title bar, body).
GREEN, BROWN = ("#232", "#353"), ("#432", "#653")
LOADERS = ("load", "lora", "checkpoint")
"""Nodes whose wires pass above those between."""
FIRST = {"prompt", "thought", "image", "image1", "image2", "folder", "lora", "answer"}
FIRST |= {"train", "pairs", "prompts", "prompt2", "prompt3", "question", "chat", "scales"}
"""Nodes to be changed first, by name, beside each Encode whose prompt is written there."""
COLOURS = ("#3f789e", "#b06634", "#88a", "#8a8", "#a1309b", "#b58b2a")
"""Of the steps, in their order."""

# "node.output node.input, ..."
ENCODED = "load.MLLM encode.mllm, load.MODEL {0}.model, encode.positive {0}.positive, encode.negative {0}.negative, "
PARTS = "noise.NOISE sample.noise, guider.GUIDER sample.guider, solver.SAMPLER sample.sampler, "
PARTS += "steps.SIGMAS sample.sigmas, "
DECODED = "sample.{} decode.samples, load.VAE decode.vae, decode.IMAGE save.images"
EMPTY = "latent.LATENT sample.latent_image, "
EDITED = "load.VAE encode.vae, encode.latent sample.latent_image, "
THOUGHT_OF = "load.MLLM think.mllm, prompt.STRING think.prompt, prompt.STRING encode.prompt, "
SAMPLED, DRAWN = ENCODED.format("sample"), DECODED.format("LATENT")
PIXELS = "image.IMAGE scale.image, scale.IMAGE pixels.pixels, load.VAE pixels.vae, "
SECOND = "load.MODEL sample2.model, {0}.positive sample2.positive, {0}.negative sample2.negative, "
SECOND += "sample2.LATENT decode2.samples, load.VAE decode2.vae, decode2.IMAGE save2.images"
AGAIN = "load.MLLM answer.mllm, decode.IMAGE answer.image1, answer.answer encode2.prompt, load.MLLM encode2.mllm, "
AGAIN += "latent.LATENT sample2.latent_image, "
ADAPTED = "load.MODEL lora.model, load.MLLM lora.mllm, "
ADAPTED += SAMPLED.replace("load.M", "lora.M")
CONTROLLED = "sample.LATENT decode.samples, load.VAE decode.vae, decode.IMAGE lines.image, lines.IMAGE apply.image, "
CONTROLLED += "checkpoint.CLIP positive.clip, checkpoint.CLIP negative.clip, control.CONTROL_NET apply.control_net, "
CONTROLLED += "positive.CONDITIONING apply.positive, negative.CONDITIONING apply.negative, "
CONTROLLED += "checkpoint.MODEL sample2.model, apply.positive sample2.positive, apply.negative sample2.negative, "
CONTROLLED += "size2.LATENT sample2.latent_image, sample2.LATENT decode2.samples, checkpoint.VAE decode2.vae, "
CONTROLLED += "decode2.IMAGE save.images"
TRY = "load.MODEL sample{0}.model, encode.positive sample{0}.positive, encode.negative sample{0}.negative, "
TRY += "encode.latent sample{0}.latent_image, sample{0}.LATENT decode{0}.samples, load.VAE decode{0}.vae, "
JUDGE = "load.MLLM {0}.mllm, {1}.IMAGE {0}.image, question.STRING {0}.question, {2} {0}.otherwise, "
SCENE = "load.MLLM think{0}.mllm, load.MLLM encode{0}.mllm, prompt{0}.STRING think{0}.prompt, "
SCENE += "prompt{0}.STRING encode{0}.prompt, think{0}.thought encode{0}.thought, load.MODEL sample{0}.model, "
SCENE += "encode{0}.positive sample{0}.positive, encode{0}.negative sample{0}.negative, "
SCENE += "encode{0}.latent sample{0}.latent_image, sample{0}.LATENT decode{0}.samples, load.VAE decode{0}.vae, "
SCENE += "decode{0}.IMAGE save{0}.images"
SEEN = "decode{0}.IMAGE think{1}.image1, decode{0}.IMAGE encode{1}.image1, load.VAE encode{1}.vae, "
LINKS = {
    "first_steps_with_nano": SAMPLED + EMPTY + DRAWN,
    "text_to_image": SAMPLED + EMPTY + DRAWN,
    "text_to_image_custom_sampling": ENCODED.format("guider") + PARTS + EMPTY + DECODED.format("output"),
    "text_to_image_ksampler": SAMPLED + EMPTY + DRAWN,
    "edit": SAMPLED + "image.IMAGE encode.image1, " + EDITED + DRAWN,
    "edit_two_references": SAMPLED + "image1.IMAGE encode.image1, image2.IMAGE encode.image2, " + EDITED + DRAWN,
    "think_then_draw": THOUGHT_OF + "think.thought encode.thought, " + SAMPLED + EMPTY + DRAWN,
    "edit_the_thought_then_draw": THOUGHT_OF + "thought.STRING encode.thought, " + SAMPLED + EMPTY + DRAWN,
    "think_then_edit": THOUGHT_OF
    + "image.IMAGE think.image1, image.IMAGE encode.image1, think.thought encode.thought, "
    + SAMPLED
    + EDITED
    + DRAWN,
    "ask_about_a_picture": "load.MLLM answer.mllm, image.IMAGE answer.image1, answer.answer preview.source",
    "compare_two_pictures": "load.MLLM answer.mllm, image1.IMAGE answer.image1, image2.IMAGE answer.image2, "
    "answer.answer preview.source",
    "chat": "load.MODEL chat.model, load.MLLM chat.mllm, load.VAE chat.vae, image.IMAGE chat.image1, "
    "chat.IMAGE shown.images",
    "draw_judge_draw_again": "load.MLLM encode.mllm, "
    + "".join(TRY.format(number) for number in ("", "2", "3"))
    + JUDGE.format("judge2", "decode2", "decode3.IMAGE")
    + JUDGE.format("judge1", "decode", "judge2.image")
    + "judge1.image save.images",
    "story_in_three_pictures": f"{SCENE.format('')}, {SEEN.format('', '2')}{SCENE.format('2')}, "
    f"{SEEN.format('2', '3')}{SCENE.format('3')}",
    "batch_of_prompts": "prompts.prompt encode.prompt, prompts.name save.filename_prefix, prompts.seed sample.seed, "
    + SAMPLED
    + EMPTY
    + DRAWN,
    "grid_of_scales": "image.IMAGE encode.image1, scales.all_cfg sample.all_cfg, scales.part_cfg sample.part_cfg, "
    "scales.columns grid.columns, "
    + SAMPLED
    + EDITED
    + DRAWN.replace("decode.IMAGE", "decode.IMAGE grid.images, grid.images"),
    "regions": "load.MLLM left.mllm, load.MLLM right.mllm, left.positive left_area.conditioning, "
    "right.positive right_area.conditioning, left_area.CONDITIONING both.conditioning_1, "
    "right_area.CONDITIONING both.conditioning_2, load.MODEL sample.model, both.CONDITIONING sample.positive, "
    "left.negative sample.negative, " + EMPTY + DRAWN,
    "masked_edit": SAMPLED
    + PIXELS
    + "scale.IMAGE encode.image1, load.VAE encode.vae, "
    + "pixels.LATENT masked.samples, image.MASK masked.mask, masked.LATENT sample.latent_image, "
    + "scale.IMAGE keep.destination, image.MASK keep.mask, "
    + DRAWN.replace("decode.IMAGE", "decode.IMAGE keep.source, keep.IMAGE"),
    "draw_ask_draw_again": SAMPLED + EMPTY + DRAWN + ", " + AGAIN + SECOND.format("encode2"),
    "picture_to_picture": SAMPLED + PIXELS + "pixels.LATENT sample.latent_image, " + DRAWN,
    "hires_second_pass": SAMPLED
    + EMPTY
    + DRAWN
    + ", sample.LATENT larger.samples, larger.LATENT sample2.latent_image, "
    + SECOND.format("encode"),
    "upscale_with_a_model": SAMPLED
    + EMPTY
    + "sample.LATENT decode.samples, load.VAE decode.vae, decode.IMAGE upscale.image, "
    + "upscaler.UPSCALE_MODEL upscale.upscale_model, upscale.IMAGE save.images",
    "with_a_lora": ADAPTED + EMPTY + DRAWN,
    "train_a_lora": "pairs.images pixels.pixels, load.VAE pixels.vae, load.MLLM captions.mllm, "
    "pairs.texts captions.prompt, load.MODEL train.model, pixels.LATENT train.latents, "
    "captions.positive train.positive, train.lora keep_lora.lora, train.steps keep_lora.steps, "
    "train.loss_map plot.loss, load.MODEL put.model, train.lora put.lora, put.model sample.model, "
    + ENCODED.format("sample").replace("load.MODEL sample.model, ", "")
    + EMPTY
    + DRAWN,
    "load_a_trained_lora": "load.MODEL lora.model, " + SAMPLED.replace("load.MODEL", "lora.MODEL") + EMPTY + DRAWN,
    "control_with_edges": "image.IMAGE canny.image, canny.IMAGE edges.images, canny.IMAGE encode.image1, "
    "load.VAE encode.vae, encode.latent sample.latent_image, load.MODEL lora.model, "
    + SAMPLED.replace("load.MODEL", "lora.MODEL")
    + DECODED.format("LATENT").replace("decode.IMAGE", "decode.IMAGE enlarge.image, enlarge.IMAGE"),
    "controlnet_of_another_model": SAMPLED + EMPTY + CONTROLLED,
    "two_gpus": "load.MODEL split.model, load.MLLM device.mllm, split.MODEL sample.model, device.MLLM encode.mllm, "
    "encode.positive sample.positive, encode.negative sample.negative, " + EMPTY + DRAWN,
    "captions_for_a_folder": "load.MLLM answer.mllm, folder.images answer.image1, folder.images save.images, "
    "answer.answer save.texts",
}

# Room for what nodes show: (width, height) in graph units. The sampler has room for its live preview, so that nothing
# moves while it draws. Below a zoom of 0.6 frontends draw no text, so that no graph may be much wider than 2400.
SIZES = {
    "note": (280, 520),
    "load": (250, 0),
    "latent": (280, 0),
    "lora": (270, 250),
    "encode": (300, 290),
    "encode2": (280, 290),
    "sample": (280, 560),
    "sample2": (280, 560),
    "decode": (210, 0),
    "decode2": (210, 0),
    "save": (340, 400),
    "save2": (280, 340),
    "image": (250, 330),
    "image1": (250, 330),
    "image2": (250, 330),
    "prompt": (250, 140),
    "thought": (300, 280),
    "think": (320, 620),
    "answer": (340, 620),
    "preview": (300, 300),
    "prompt2": (250, 140),
    "prompt3": (250, 140),
    "question": (250, 110),
    "think2": (320, 620),
    "think3": (320, 620),
    "encode3": (280, 290),
    "sample3": (280, 560),
    "save3": (280, 340),
    "chat": (420, 760),
    "shown": (340, 400),
    "prompts": (280, 260),
    "left": (300, 290),
    "right": (300, 290),
    "captions": (280, 290),
    "train": (300, 560),
    "keep_lora": (280, 110),
    "plot": (280, 300),
    "put": (250, 110),
    "canny": (250, 110),
    "edges": (250, 300),
    "enlarge": (280, 110),
    "positive": (250, 110),
    "negative": (250, 90),
    "split": (300, 0),
    "device": (300, 0),
}
# Narrower where much stands side by side.
NARROW = {
    "save": (230, 300),
    "save2": (250, 320),
    "sample": (265, 540),
    "sample2": (265, 540),
    "encode": (240, 290),
    "encode2": (240, 290),
    "answer": (280, 620),
    "note": (240, 560),
    "latent": (240, 0),
    "load": (240, 0),
    **{f"think{number}": (280, 620) for number in ("", "2", "3")},
    **{f"prompt{number}": (220, 200) for number in ("", "2", "3")},
    "sample3": (265, 540),
    "encode3": (240, 290),
    "save3": (250, 320),
    "control": (225, 90),
    "captions": (240, 290),
    "train": (270, 560),
    "keep_lora": (230, 110),
    "plot": (230, 260),
    "pairs": (240, 110),
    "put": (240, 110),
}
WIDE = (
    "draw_judge_draw_again",
    "story_in_three_pictures",
    "draw_ask_draw_again",
    "hires_second_pass",
    "controlnet_of_another_model",
    "train_a_lora",
)


SAMPLER_HEIGHT = (800, 720)
"""Of our sampler, alone and where much stands side by side: widgets, which older pages do not fold, and a preview."""

CLEAR = {"story_in_three_pictures": 14}
"""How far wires keep from the sides of nodes, where not 3: newer frontends move slots a little."""


def sizes(name: str) -> dict[str, tuple[int, int]]:
    """Returns the room that a workflow's nodes get."""
    wide = name in WIDE
    room = SIZES | (NARROW if wide else {})
    samplers = [node for node, kind, _ in nodes(name) if kind == "InternVLU_SampleLatent"]
    return room | {node: (room[node][0], SAMPLER_HEIGHT[wide]) for node in samplers}
