"""What is inside disk images, through libguestfs' appliance."""


def letters(number: int) -> str:
    """What stands behind /dev/sd for a drive, a for 0 and aa for 26; its label, too."""
    rest, last = divmod(number, 26)
    return (letters(rest - 1) if rest else "") + chr(ord("a") + last)
