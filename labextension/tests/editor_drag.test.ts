import { expect, test } from 'vitest'
import { point, smallState, Stage } from './map_stage'

function dragTo(stage: Stage, label: string, device: string): Element {
  const target = stage.tier(device).querySelector('.bar') as Element
  point(stage.block(label), 'pointerdown', 10, 10)
  point(stage.block(label), 'pointermove', 20, 10)
  point(target, 'pointermove', 40, 90)
  return target
}

test('a block is dragged to another tier', () => {
  const stage = new Stage(smallState())
  const target = dragTo(stage, 'layers.2', 'cpu')
  expect(stage.one('.ghost').hidden).toBe(false)
  expect([...stage.one('.ghost').children].map(line => line.textContent)).toEqual(['1 block, 1.0 GiB → RAM', '4.0 GiB spare'])
  expect(stage.tier('cpu').classList).toContain('aimed')
  expect(stage.tier('disk').classList).toContain('target')
  expect(stage.sent).toEqual([])
  point(target, 'pointerup', 40, 90)
  expect(stage.one('.ghost').hidden).toBe(true)
  expect(stage.labelsIn('cpu')).toContain('layers.2')
  expect(stage.proposals).toHaveLength(1)
  expect(stage.tier('disk').classList).not.toContain('target')
})

test('the whole selection goes, also from the strip, with a finger', () => {
  const stage = new Stage(smallState())
  stage.click(stage.cell('layers.0'))
  stage.click(stage.cell('layers.2'), { shiftKey: true })
  const finger = { pointerType: 'touch', pointerId: 7 }
  point(stage.cell('layers.1'), 'pointerdown', 10, 10, finger)
  point(stage.cell('layers.1'), 'pointermove', 10, 40, finger)
  point(stage.tier('disk'), 'pointermove', 10, 80, { pointerId: 8 })
  point(stage.tier('disk'), 'pointermove', 10, 80, finger)
  expect(stage.one('.ghost').textContent).toBe('3 blocks, 3.0 GiB → Disk')
  point(stage.tier('disk'), 'pointerup', 10, 80, finger)
  expect(stage.labelsIn('disk')).toEqual(['layers.0', 'layers.1', 'layers.2', 'layers.7'])
})

test('a small move is a click', () => {
  const stage = new Stage(smallState())
  point(stage.block('layers.2'), 'pointerdown', 10, 10)
  point(stage.block('layers.2'), 'pointermove', 12, 12)
  point(stage.block('layers.2'), 'pointerup', 12, 12)
  stage.click(stage.block('layers.2'))
  expect(stage.selected()).toEqual(['layers.2'])
  expect(stage.sent).toEqual([])
})

test('the click after a drag is not one', () => {
  const stage = new Stage(smallState())
  const target = dragTo(stage, 'layers.2', 'cpu')
  point(target, 'pointerup', 40, 90)
  stage.click(stage.block('layers.6'))
  expect(stage.selected()).toEqual(['layers.2'])
})

test('Escape, a lost pointer, and nowhere cancel', () => {
  const stage = new Stage(smallState())
  const target = dragTo(stage, 'layers.2', 'cpu')
  expect(stage.key(document.body, 'Escape').defaultPrevented).toBe(true)
  point(target, 'pointerup', 40, 90)
  dragTo(stage, 'layers.2', 'cpu')
  point(target, 'pointercancel', 40, 90)
  point(target, 'pointerup', 40, 90)
  dragTo(stage, 'layers.2', 'cpu')
  point(document.body, 'pointermove', 900, 900)
  point(document.body, 'pointerup', 900, 900)
  expect(stage.sent).toEqual([])
  expect(stage.one('.ghost').hidden).toBe(true)
  expect(stage.tier('cpu').classList).not.toContain('aimed')
})

test('a tier that holds no blocks is no target, and a lost view has no drags', () => {
  const state = smallState()
  Object.assign(state.plan.tiers[2] ?? {}, { can_hold: false })
  const stage = new Stage(state)
  const target = dragTo(stage, 'layers.2', 'disk')
  expect(stage.tier('disk').classList).not.toContain('aimed')
  point(target, 'pointerup', 40, 90)
  stage.shown.lost('Gone.')
  dragTo(stage, 'layers.2', 'cpu')
  expect(stage.one('.ghost').hidden).toBe(true)
  expect(stage.sent).toEqual([])
})
