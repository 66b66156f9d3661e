"""What ``torch.compile`` is told, without importing the compiler."""


def constant(function):
    """``torch.compiler.assume_constant_result``: the result does not change from call to call.

    That one imports the compiler, and takes longer than importing all of this package.
    """
    function._dynamo_marked_constant = True
    return function
