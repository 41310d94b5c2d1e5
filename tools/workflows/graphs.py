"""What the shipped workflows consist of: nodes, values, links and notes. Data only, for build.py."""

from __future__ import annotations

FOLDER = """No model yet? In **Load InternVL-U**, choose the **download** as **model_name** and run. Or put the whole \
model folder into **models/InternVL-U/InternVL-U**, from Hugging Face \
([InternVL-U/InternVL-U](https://huggingface.co/InternVL-U/InternVL-U)) or ModelScope \
([OpenGVLab/InternVL-U](https://modelscope.cn/models/OpenGVLab/InternVL-U)), then press **R**."""
CHANGE = "Change the **prompt** first (English or Chinese), then the **seed** and the size **preset**."
CHOOSE = "First choose your picture in **Load Image**, then write into **prompt** what to change (English or Chinese)."
EDIT_VALUES = """Official values: **steps** 20, **all_cfg** 4.5, **part_cfg** 2.0. Higher **all_cfg** follows the \
words more closely, higher **part_cfg** the picture."""
THINK_VALUES = """Official values with a thought: **max_new_tokens** 200, **greedy**, **all_cfg** 3.5, **part_cfg** \
1.5."""
ANSWER_VALUES = "Official values: **max_new_tokens** 512, **greedy**: the same question gets the same answer."

NOTES = {
    "text_to_image": f"""## Text to image

{FOLDER}

{CHANGE}

Official values: **steps** 20, **all_cfg** 4.5, **part_cfg** 2.0. Higher **all_cfg** follows the words more closely; \
**part_cfg** changes nothing without reference images.
""",
    "text_to_image_custom_sampling": f"""## Text to image, custom sampling

{FOLDER}

Guider, solver, scheduler and noise are nodes of their own here, so that each can be exchanged. As they are, they \
draw what **InternVL-U Sampler** draws.

Official values: **steps** 20, **all_cfg** 4.5. **VAE Decode** works like **InternVL-U Decode**, half a level of 255 \
darker.
""",
    "text_to_image_ksampler": f"""## Text to image, KSampler

{FOLDER}

{CHANGE}

Typical values: **steps** 20, **cfg** 4.5 (it is all_cfg), **euler**, **simple**. For the official solver and schedule \
take **InternVL-U Sampler** instead.
""",
    "edit": f"""## Edit a picture

{FOLDER}

{CHOOSE}

The result has the picture's own size, brought into the trained range. For another size connect \
**Empty InternVL-U Latent** to the sampler.

{EDIT_VALUES}
""",
    "edit_two_references": f"""## Edit with two pictures

{FOLDER}

First choose both pictures, then the **prompt**. Each **\\<image\\>** in it stands for one picture, in the order of \
the inputs. Up to four inputs can be connected.

The result has the size of **image1**. {EDIT_VALUES} The official code takes one picture only.
""",
    "think_then_draw": f"""## Think, then draw

{FOLDER}

Change the **Prompt** first. The model thinks about it, the thought appears on **InternVL-U Think**, and the picture \
is drawn from both. Meant for prompts that need knowledge or reasoning.

{THINK_VALUES}
""",
    "edit_the_thought_then_draw": f"""## Edit the thought, then draw

{FOLDER}

1. Change the **Prompt** and run: a new thought appears on **InternVL-U Think**.
2. Press **Copy** there, paste it into **Thought to draw from** and change what you like.
3. Run again: only the picture is made anew.

The picture is always drawn from the text in that box. {THINK_VALUES}
""",
    "think_then_edit": f"""## Think, then edit

{FOLDER}

First choose your picture in **Load Image**, then the **Prompt**. The model thinks about both, the thought appears on \
**InternVL-U Think**, and the picture is edited by it. Meant for changes that need knowledge or reasoning.

{THINK_VALUES}
""",
    "ask_about_a_picture": f"""## Ask about a picture

{FOLDER}

First choose your picture in **Load Image**, then the **question** (English or Chinese). The answer appears on the \
node while it is written; **Preview as Text** stands for whatever you do with it next.

{ANSWER_VALUES} For variety set **how** to sampling.
""",
    "compare_two_pictures": f"""## Compare two pictures

{FOLDER}

First choose both pictures, then the **question**. Up to four inputs can be connected, and a batch counts as several \
pictures. **\\<image\\>** in the question marks the place of a picture; without marks all come first.

{ANSWER_VALUES}
""",
    "masked_edit": f"""## Edit only a part

{FOLDER}

As it comes, it changes the dress of the example picture. For your own:

1. Choose a picture in **Load Image**, open it in the mask editor (right click on the node) and paint.
2. Select **Example: add a rectangle** and press **Ctrl + B** to bypass it.
3. Change the **prompt**.

What is not painted stays as it was. The official pipeline has no masks. {EDIT_VALUES}
""",
    "draw_ask_draw_again": f"""## Draw, ask, draw again

{FOLDER}

Draws a picture, asks the model for a better description of it, and draws that. Change the first **prompt**, then \
the **question**.

Official values: **steps** 20, **all_cfg** 4.5, **part_cfg** 2.0. The official code does the steps one at a time; \
here they follow each other.
""",
    "picture_to_picture": f"""## Picture to picture

{FOLDER}

Starts from your picture instead of pure noise. First choose it in **Load Image**, then the **prompt**: it describes \
the whole new picture, it is no instruction.

**denoise** 0.6 keeps the rough layout, 0.3 most of the picture, 1.0 nothing. **steps** 20, **all_cfg** 4.5 as \
usual. The official pipeline always starts from noise; to change one thing take **edit**.
""",
}

PROMPT = "a red fox reading a newspaper in a sunny kitchen, watercolour"
EDIT_PROMPT = "turn this drawing into a soft watercolour painting"
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

FIXED = {"control_after_generate": "fixed"}
STEPS = {"steps": 20, "denoise": 1.0}
GUIDANCE = {"all_cfg": 4.5, "part_cfg": 2.0}
THOUGHT_GUIDANCE = {"all_cfg": 3.5, "part_cfg": 1.5}
SAMPLER = FIXED | {"seed": 1234} | STEPS | GUIDANCE
KSAMPLER = FIXED | {"seed": 1234} | STEPS | {"cfg": 4.5, "sampler_name": "euler", "scheduler": "simple"}
WRITING = FIXED | {"how": "greedy", "seed": 1234}
SCALE = {"upscale_method": "lanczos", "largest_size": 1024}
# Units of the 64 x 64 mask that Load Image gives for a picture without transparency; masks are stretched to fit.
RECTANGLE = {"value": 1.0, "width": 22, "height": 30}
PLACE = {"x": 21, "y": 26, "operation": "add"}

LOAD = ("load", "InternVLU_LoadModel", {"model_name": "InternVL-U", "precision": "auto"})
LATENT_SIZE = {"preset": "1024 x 1024", "width": 1024, "height": 1024, "batch_size": 1}
LATENT = ("latent", "InternVLU_CreateLatent", LATENT_SIZE)
NOTE = ("note", "MarkdownNote", {})
SAMPLE = ("sample", "InternVLU_SampleLatent", SAMPLER)
SAMPLE_THOUGHT = ("sample", "InternVLU_SampleLatent", SAMPLER | THOUGHT_GUIDANCE)
DECODE = ("decode", "InternVLU_DecodeLatent", {"width": 0, "height": 0})
SAVE = [("save", "SaveImage", {"filename_prefix": "InternVL-U"})]


def image(name: str = "image") -> tuple:
    return (name, "LoadImage", {"image": "example.png"})


def encode(prompt: str = "") -> tuple:
    return ("encode", "InternVLU_EncodePrompt", {"prompt": prompt})


def text(name: str, value: str) -> tuple:
    return (name, "PrimitiveStringMultiline", {"value": value})


def answer(question: str) -> tuple:
    return ("answer", "InternVLU_AnswerQuestion", WRITING | {"question": question, "max_new_tokens": 512})


THINK = ("think", "InternVLU_WriteThought", WRITING | {"max_new_tokens": 200})

# Columns from left to right, each from top to bottom: (name, node type, values). Ids follow this order.
COLUMNS = {
    "text_to_image": [[LOAD, LATENT], [encode(PROMPT), NOTE], [SAMPLE, DECODE], SAVE],
    "text_to_image_custom_sampling": [
        [LOAD, LATENT],
        [encode(PROMPT), NOTE],
        [
            ("noise", "RandomNoise", FIXED | {"noise_seed": 1234}),
            ("guider", "InternVLU_CreateGuider", GUIDANCE),
            ("solver", "InternVLU_SelectSampler", {}),
            ("steps", "InternVLU_ScheduleSteps", STEPS),
        ],
        [("sample", "SamplerCustomAdvanced", {}), ("decode", "VAEDecode", {})],
        SAVE,
    ],
    "text_to_image_ksampler": [
        [LOAD, LATENT],
        [encode(PROMPT), NOTE],
        [("sample", "KSampler", KSAMPLER), ("decode", "VAEDecode", {})],
        SAVE,
    ],
    "edit": [[LOAD, image()], [encode(EDIT_PROMPT), NOTE], [SAMPLE, DECODE], SAVE],
    "edit_two_references": [
        [LOAD, image("image1"), image("image2")],
        [encode("put the character of <image> into the scene of <image>, as a watercolour"), NOTE],
        [SAMPLE, DECODE],
        SAVE,
    ],
    "think_then_draw": [
        [LOAD, text("prompt", RIDDLE), LATENT],
        [THINK],
        [encode(), NOTE],
        [SAMPLE_THOUGHT, DECODE],
        SAVE,
    ],
    "edit_the_thought_then_draw": [
        [LOAD, text("prompt", RIDDLE), LATENT],
        [THINK],
        [text("thought", THOUGHT), NOTE],
        [encode(), SAMPLE_THOUGHT, DECODE],
        SAVE,
    ],
    "think_then_edit": [
        [LOAD, text("prompt", "show the same scene in the season after autumn"), image()],
        [THINK],
        [encode(), NOTE],
        [SAMPLE_THOUGHT, DECODE],
        SAVE,
    ],
    "ask_about_a_picture": [
        [LOAD, image()],
        [answer("Describe this picture in detail.")],
        [("preview", "PreviewAny", {}), NOTE],
    ],
    "compare_two_pictures": [
        [LOAD, image("image1"), image("image2")],
        [answer("What is different between these two pictures, and what is the same?")],
        [NOTE],
    ],
    "masked_edit": [
        [LOAD, image()],
        [
            ("scale", "ImageScaleToMaxDimension", SCALE),
            ("pixels", "VAEEncode", {}),
            ("rectangle", "SolidMask", RECTANGLE),
            ("mask", "MaskComposite", PLACE),
            ("masked", "SetLatentNoiseMask", {}),
        ],
        [encode("give her a blue dress with white dots"), NOTE],
        [SAMPLE, DECODE, ("keep", "ImageCompositeMasked", {"x": 0, "y": 0, "resize_source": True})],
        SAVE,
    ],
    "draw_ask_draw_again": [
        [LOAD, LATENT],
        [encode(PROMPT), SAMPLE, DECODE],
        [answer(BETTER), NOTE],
        [
            ("encode2", "InternVLU_EncodePrompt", {}),
            ("sample2", "InternVLU_SampleLatent", SAMPLER),
            ("decode2", "InternVLU_DecodeLatent", {"width": 0, "height": 0}),
        ],
        [*SAVE, ("save2", "SaveImage", {"filename_prefix": "InternVL-U_again"})],
    ],
    "picture_to_picture": [
        [LOAD, image()],
        [("scale", "ImageScaleToMaxDimension", SCALE), ("pixels", "VAEEncode", {})],
        [encode("an oil painting of a fairy in a pink dress on a green hill, blue sky with clouds"), NOTE],
        [("sample", "InternVLU_SampleLatent", SAMPLER | {"denoise": 0.6}), DECODE],
        SAVE,
    ],
}

# Titles other than the nodes' own, by the names above.
TITLES = {
    "prompt": "Prompt",
    "thought": "Thought to draw from",
    "image1": "Load Image 1",
    "image2": "Load Image 2",
    "preview": "Preview as Text",
    "scale": "Scale the longer side",
    "keep": "Keep what is not painted",
    "rectangle": "Example: a rectangle",
    "mask": "Example: add a rectangle",
    "encode2": "InternVL-U Encode, from the answer",
    "save2": "Save Image, the second",
}

# "node.output node.input, ..."
ENCODED = "load.MLLM encode.mllm, load.MODEL {0}.model, encode.positive {0}.positive, encode.negative {0}.negative, "
PARTS = "noise.NOISE sample.noise, guider.GUIDER sample.guider, solver.SAMPLER sample.sampler, "
PARTS += "steps.SIGMAS sample.sigmas, "
DECODED = "sample.{} decode.samples, load.VAE decode.vae, decode.IMAGE save.images"
SIZED = "latent.LATENT sample.latent_image, "
EDITED = "load.VAE encode.vae, encode.latent sample.latent_image, "
THOUGHT_OF = "load.MLLM think.mllm, prompt.STRING think.prompt, prompt.STRING encode.prompt, "
SAMPLED, DRAWN = ENCODED.format("sample"), DECODED.format("LATENT")
PIXELS = "image.IMAGE scale.image, scale.IMAGE pixels.pixels, load.VAE pixels.vae, "
AGAIN = "load.MLLM answer.mllm, decode.IMAGE answer.image1, answer.answer encode2.prompt, load.MLLM encode2.mllm, "
AGAIN += "load.MODEL sample2.model, encode2.positive sample2.positive, encode2.negative sample2.negative, "
AGAIN += "latent.LATENT sample2.latent_image, sample2.LATENT decode2.samples, load.VAE decode2.vae, "
LINKS = {
    "text_to_image": SAMPLED + SIZED + DRAWN,
    "text_to_image_custom_sampling": ENCODED.format("guider") + PARTS + SIZED + DECODED.format("output"),
    "text_to_image_ksampler": SAMPLED + SIZED + DRAWN,
    "edit": SAMPLED + "image.IMAGE encode.image1, " + EDITED + DRAWN,
    "edit_two_references": SAMPLED + "image1.IMAGE encode.image1, image2.IMAGE encode.image2, " + EDITED + DRAWN,
    "think_then_draw": THOUGHT_OF + "think.thought encode.thought, " + SAMPLED + SIZED + DRAWN,
    "edit_the_thought_then_draw": THOUGHT_OF + "thought.STRING encode.thought, " + SAMPLED + SIZED + DRAWN,
    "think_then_edit": THOUGHT_OF
    + "image.IMAGE think.image1, image.IMAGE encode.image1, think.thought encode.thought, "
    + SAMPLED
    + EDITED
    + DRAWN,
    "ask_about_a_picture": "load.MLLM answer.mllm, image.IMAGE answer.image1, answer.answer preview.source",
    "compare_two_pictures": "load.MLLM answer.mllm, image1.IMAGE answer.image1, image2.IMAGE answer.image2",
    "masked_edit": SAMPLED
    + PIXELS
    + "scale.IMAGE encode.image1, load.VAE encode.vae, image.MASK mask.destination, rectangle.MASK mask.source, "
    + "pixels.LATENT masked.samples, mask.MASK masked.mask, masked.LATENT sample.latent_image, "
    + "scale.IMAGE keep.destination, mask.MASK keep.mask, "
    + DRAWN.replace("decode.IMAGE", "decode.IMAGE keep.source, keep.IMAGE"),
    "draw_ask_draw_again": SAMPLED + SIZED + DRAWN + ", " + AGAIN + "decode2.IMAGE save2.images",
    "picture_to_picture": SAMPLED + PIXELS + "pixels.LATENT sample.latent_image, " + DRAWN,
}

# Where the contents need more room than a node takes by itself: (width, height) in graph units. Below a zoom of 0.6
# frontends draw no text, so that no graph may be much wider than 1900.
SIZES = {
    "note": (360, 280),
    "encode": (360, 320),
    "encode2": (360, 320),
    "save": (360, 450),
    "save2": (360, 450),
    "image": (280, 350),
    "image1": (280, 350),
    "image2": (280, 350),
    "prompt": (280, 130),
    "thought": (360, 280),
    "think": (360, 640),
    "answer": (360, 640),
    "preview": (360, 240),
}
