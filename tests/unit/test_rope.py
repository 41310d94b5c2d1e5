import torch
from pack.internvl_u.rope import Span, position_ids, rotary_table


def test_positions_of_text_to_image_equal_the_official_ones(case):
    size = case["noise"].shape[-2:]
    grid = (size[0] // 2, size[1] // 2)
    found = [position_ids(grid, [], (Span(len(case.context(i))),), 0.25) for i in range(3)]
    assert torch.equal(torch.cat(found), case["position_ids"])


def test_positions_of_references_and_pictures_in_the_context_equal_the_official_ones(golden):
    case = golden("edit_one")
    found = []
    for branch in range(3):
        layout = case.layout(branch)
        references = [(4, 6)] if any(span.is_image for span in layout) else []
        found.append(position_ids((4, 6), references, layout, 0.25))
    assert torch.equal(torch.cat(found), case["position_ids"])


def test_each_reference_has_a_frame_of_its_own():
    frames = position_ids((2, 2), [(2, 2), (1, 3)], (Span(2),), 0.25)[:, 0]
    assert frames.tolist() == [0] * 4 + [1] * 4 + [2] * 3 + [3, 4]


def test_rotary_table_turns_by_position_over_theta():
    table = rotary_table(torch.tensor([[0.0, 2.0, 3.0]]), (2, 4, 2), 100.0)
    angles = torch.tensor([0.0, 2.0, 2.0 / 10, 3.0])
    assert torch.allclose(table[:, 0], torch.stack([angles.cos(), angles.sin()]))
