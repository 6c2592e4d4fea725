"""``lorica push``: an adapter to the Hub."""

from __future__ import annotations

from typing import Any

from lorica.cli.shared.parsing import Parser


def parser() -> Parser:
    """The command's options."""
    result = Parser(
        "push",
        description="Upload an adapter's files, and nothing else in the folder, to the Hugging Face Hub in "
        "one commit. The repository is made if need be.",
    )
    add = result.add_argument
    add("folder", type=str, help="folder with the adapter, lorica's or PEFT's")
    add("repo_id", type=str, help="name of the repository, such as user/sentiment")
    add("--subfolder", type=str, default=None, help="where in the repository (default: at its top)")
    add("--revision", type=str, default=None, help="branch; made if it is not there (default: the main one)")
    add("--private", action="store_true", help="make the repository private (default: as the account has it)")
    text = "of the account (default: HF_TOKEN, or the one of `hf auth login`)"
    add("--token", type=str, default=None, help=text)
    add("--commit_message", type=str, default=None, help="title of the commit")
    add("--create_pr", action="store_true", help="open a pull request, in place of a commit to the branch")
    return result


def run(argv: list[str]) -> int:
    """Upload, and say where to."""
    parsed: Any = parser().parse_args(argv)

    from lorica.checkpoint import push

    url = push(
        parsed.folder,
        parsed.repo_id,
        subfolder=parsed.subfolder,
        revision=parsed.revision,
        private=parsed.private or None,
        token=parsed.token,
        commit_message=parsed.commit_message,
        create_pr=parsed.create_pr,
    )
    print(f"pushed {parsed.folder} to {url}")
    return 0
