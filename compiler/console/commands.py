"""Groups of commands that answer an unknown name with the nearest."""

from __future__ import annotations

import click

from ...errors import UnknownNameError


class Named(click.Group):
    """A group whose commands are listed by `list_commands` and made by `get_command`."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Finds the command, or names the nearest: click would look for it among commands that are made already."""
        name = ctx.token_normalize_func(args[0]) if ctx.token_normalize_func else args[0]
        if name not in self.list_commands(ctx) and not name.startswith("-") and not ctx.resilient_parsing:
            raise UnknownNameError("command", name, self.list_commands(ctx))
        return super().resolve_command(ctx, args)


def printing(command: click.Command) -> click.Command:
    """Gives a command the options that all have."""
    command.params += [
        click.Option(["--json", "as_json"], is_flag=True, help="Print the result as JSON."),
        click.Option(["--quiet", "-q"], is_flag=True, help="Print nothing but errors (and the JSON)."),
    ]
    return command
