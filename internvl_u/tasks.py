"""Ready questions: what people ask a model about pictures most, in words that it follows. Imports nothing heavy."""

from __future__ import annotations

AS_WRITTEN = "as written"
"""The task of a question that is asked as it stands."""
QUESTIONS = {
    "caption": "Write a caption for this picture: its main subject, what happens, the place and the style, in one or "
    "two sentences. Write only the caption.",
    "detailed caption": "Describe this picture in one paragraph: subjects with their colours, shapes, materials, "
    "number and places, the background, the light, any text, and the style. Write only the description.",
    "tags": "List what this picture shows as tags: at most 30 short tags in lower case, separated by commas, the "
    "most important first. Write only the tags.",
    "OCR": "Write down all text in this picture, word for word and line by line, in its own language. If there is "
    "none, write: no text.",
    "compare": "Compare these pictures: first what they have in common, then each thing that differs, in short "
    "sentences.",
    "better prompt": "Make a better prompt for drawing a picture of the following: one paragraph that keeps all that "
    "is said and adds surroundings, light, colours, composition and style. Write only the prompt.",
    "prompt for Flux": "Write a prompt for the image model Flux that draws this: one paragraph of plain sentences, "
    "first the subject, then the surroundings, the light and the style. Write only the prompt.",
    "prompt for SDXL": "Write a prompt for the image model SDXL that draws this: keywords and short phrases in "
    "English, separated by commas, first the subject, then details, light, style and quality. Write only the prompt.",
}
TASKS = (AS_WRITTEN, *QUESTIONS)


def question_for(task: str, written: str = "") -> str:
    """Returns the question of a task; what was `written` comes after it, in a line of its own.

    Raises:
        ValueError: there is no such task.
    """
    if task == AS_WRITTEN:
        return written
    if task not in QUESTIONS:
        raise ValueError(f"task {task!r} found, one of {', '.join(TASKS)} expected")
    return f"{QUESTIONS[task]}\n{written}" if written.strip() else QUESTIONS[task]
