"""Templates as plain data: text around the fields of a record, and those that are built in."""

from dataclasses import asdict, dataclass

Record = dict[str, str]  # instruction, context, response, category; what a record lacks is ""


@dataclass(frozen=True)
class PromptTemplate:
    """The text around a record's fields; `{instruction}` and `{context}` stand for them, nothing else is replaced.

    A prompt is `instruction`, then `context` unless the record has none, then `answer`; the response and `end` follow,
    then the end of text. The tail from the response on is what training is scored on.
    """

    name: str
    instruction: str
    context: str
    answer: str
    end: str = ""

    def prompt(self, record: Record) -> str:
        """Everything before the response."""
        parts = [self.instruction.replace("{instruction}", record["instruction"])]
        if record.get("context"):
            parts.append(self.context.replace("{context}", record["context"]))
        return "".join([*parts, self.answer])

    def spec(self) -> dict[str, str]:
        """Plain values for dataset.json and checkpoints; `template_from_spec` reads them."""
        return asdict(self)


TEMPLATES: dict[str, PromptTemplate] = {
    template.name: template
    for template in (
        # No preamble: it would cost 20 to 30 tokens of every record, and a small model learns nothing from it.
        PromptTemplate(
            name="dolly",
            instruction="### Instruction:\n{instruction}\n\n",
            context="### Context:\n{context}\n\n",
            answer="### Response:\n",
        ),
        PromptTemplate(
            name="alpaca",
            instruction="Carry out the task that follows.\n\n### Instruction:\n{instruction}\n\n",
            context="### Input:\n{context}\n\n",
            answer="### Response:\n",
        ),
        PromptTemplate(
            name="zh_instruction",
            instruction="### 指令:\n{instruction}\n\n",
            context="### 输入:\n{context}\n\n",
            answer="### 输出:\n",
        ),
        PromptTemplate(
            name="human_assistant",
            instruction="Human: {instruction}\n",
            context="{context}\n",
            answer="Assistant: ",
            end="\n",
        ),
        PromptTemplate(
            name="zh_code",
            instruction="问题: {instruction}\n\n",
            context="{context}\n\n",
            answer="解决方案:\n```python\n",
            end="\n```",
        ),
    )
}
