"""Tests of pipelines.grids: pictures stand where their prompt, model and seed say."""

import torch

from pipelines.grids import BLOCK_GAP_PX, GAP_PX, PICTURE_PX, TEXT_PX, draw_grid, tile_px


def pictures(num_prompts: int, num_seeds: int, px: int, red: int) -> torch.Tensor:
    """Plain pictures, uint8 (prompts, seeds, 3, px, px), each in a colour of its own."""
    grid = torch.zeros(num_prompts, num_seeds, 3, px, px, dtype=torch.uint8)
    grid[:, :, 0] = red
    grid[:, :, 1] = 50 * torch.arange(num_prompts, dtype=torch.uint8).view(-1, 1, 1, 1)
    grid[:, :, 2] = 50 * torch.arange(num_seeds, dtype=torch.uint8).view(1, -1, 1, 1)
    return grid


def test_every_picture_stands_in_its_place() -> None:
    """A row a prompt, a block a model, a column a seed, each enlarged by a whole factor."""
    models = {"base": pictures(2, 3, 16, red=100), "ensemble": pictures(2, 3, 16, red=200)}
    canvas = draw_grid(["one", "two"], models)
    block = 3 * (PICTURE_PX + GAP_PX) + BLOCK_GAP_PX
    row = PICTURE_PX + GAP_PX + TEXT_PX
    assert canvas.size == (2 * block, TEXT_PX + 2 * row)
    for model_index, red in enumerate((100, 200)):
        for prompt_index in range(2):
            for seed_index in range(3):
                left = model_index * block + seed_index * (PICTURE_PX + GAP_PX)
                top = 2 * TEXT_PX + prompt_index * row
                colour = (red, 50 * prompt_index, 50 * seed_index)
                for corner in (0, PICTURE_PX - 1):
                    assert canvas.getpixel((left + corner, top + corner)) == colour
                assert canvas.getpixel((left + PICTURE_PX, top)) == (255, 255, 255)


def test_large_pictures_keep_their_size() -> None:
    """Nothing is ever made smaller or blurred."""
    noise = torch.randint(0, 256, (1, 1, 3, 128, 128), dtype=torch.uint8)
    canvas = draw_grid(["one"], {"base": noise})
    tile = canvas.crop((0, 2 * TEXT_PX, 128, 2 * TEXT_PX + 128))
    assert tile.tobytes() == noise[0, 0].permute(1, 2, 0).numpy().tobytes()


def test_prompts_and_models_are_written_in_the_margins() -> None:
    """There is ink above the block and above the row."""
    canvas = draw_grid(["one"], {"base": pictures(1, 1, 16, red=0)}).convert("L")
    for top in (0, TEXT_PX):
        assert canvas.crop((0, top, PICTURE_PX, top + TEXT_PX)).getextrema()[0] < 200


def test_blocks_of_other_sizes_and_columns_stand_beside_each_other() -> None:
    """One reference and three pictures a row, small and large: all tiles have one size."""
    blocks = {"reference": pictures(2, 1, 96, red=10), "drawn": pictures(2, 3, 8, red=20)}
    canvas = draw_grid(["one", "two"], blocks)
    step, row = PICTURE_PX + GAP_PX, PICTURE_PX + GAP_PX + TEXT_PX
    assert canvas.size == (4 * step + 2 * BLOCK_GAP_PX, TEXT_PX + 2 * row)
    second_block = step + BLOCK_GAP_PX
    for prompt_index in range(2):
        top = 2 * TEXT_PX + prompt_index * row
        assert canvas.getpixel((PICTURE_PX - 1, top)) == (10, 50 * prompt_index, 0)
        for seed_index in range(3):
            left = second_block + seed_index * step
            colour = (20, 50 * prompt_index, 50 * seed_index)
            assert canvas.getpixel((left + PICTURE_PX - 1, top + PICTURE_PX - 1)) == colour


def test_tiles_are_whole_multiples_of_their_pictures() -> None:
    """At least PICTURE_PX, and no more than it takes."""
    assert [tile_px(image_px) for image_px in (8, 36, 96, 128)] == [96, 108, 96, 128]
