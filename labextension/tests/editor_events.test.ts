import { afterEach, beforeEach, expect, test, vi } from 'vitest'
import { Talk } from '../src/views/editor/talk'
import type { Command, MapState } from '../src/wire'
import { otherState, point, smallState, Stage } from './map_stage'

const GIB = 1024 ** 3
const ALT_DOWN: [string, KeyboardEventInit] = ['ArrowDown', { altKey: true }]
const PROGRESS = {
  type: 'progress', phase: 'moving', done: 1, total: 4, unit: 'blocks', detail: 'layers.3', elapsed_s: 2, left_s: 1,
}
const FOREIGN = 77

beforeEach(() => {
  vi.useFakeTimers()
  vi.spyOn(Math, 'random').mockReturnValue(0)
})
afterEach(() => {
  vi.restoreAllMocks()
  vi.useRealTimers()
})

/** A stage where a block was moved, and Python said what that means. */
function proposed(state = smallState()): Stage {
  const stage = new Stage(state)
  stage.click(stage.block('layers.3'))
  stage.key(stage.block('layers.3'), ...ALT_DOWN)
  stage.answer({ decode_tps: 7 })
  return stage
}

function applying(state = smallState()): Stage {
  const stage = proposed(state)
  stage.click(stage.button('Apply'))
  return stage
}

const alert = (stage: Stage) => stage.one('[role="alert"]').textContent
const isApplying = (stage: Stage) => !stage.one('.job').hidden

// --- States and answers that change nothing of what a person does

test('a state of the same placement keeps edits, steps back, and the selection', () => {
  const stage = proposed()
  stage.shown.update({ ...smallState(), measured_tps: 12 })
  expect(stage.labelsIn('cpu')).toContain('layers.3')
  expect(stage.selected()).toEqual(['layers.3'])
  expect(stage.text).toContain('forecast 7.0 tok/s')
  expect(stage.button('Apply').disabled).toBe(false)
  stage.click(stage.button('Undo'))
  expect(stage.text).toContain('measured 12.0 tok/s')
})

test('a state of the same placement leaves a question, a drag and an Apply alone', () => {
  const stage = new Stage(smallState())
  stage.key(stage.block('layers.3'), ...ALT_DOWN)
  const bar = stage.tier('disk').querySelector('.bar') as Element
  point(stage.block('layers.2'), 'pointerdown', 10, 10)
  point(bar, 'pointermove', 40, 90)
  stage.shown.update(smallState())
  expect(stage.one('.ghost').hidden).toBe(false)
  point(bar, 'pointerup', 40, 90)
  expect(stage.labelsIn('disk')).toContain('layers.2')
  stage.answer()
  stage.answer()
  stage.click(stage.button('Apply'))
  stage.shown.update(smallState())
  expect(isApplying(stage)).toBe(true)
})

test.each<[string, (state: MapState) => void]>([
  ['home', ({ plan }) => void Object.assign(plan.blocks[1] ?? {}, { home: 'cpu' })],
  ['way', ({ plan }) => void Object.assign(plan.blocks[8] ?? {}, { way: 'kept' })],
  ['budget', ({ plan }) => void Object.assign(plan.tiers[1] ?? {}, { limit: 4 * GIB })],
  ['status', state => void Object.assign(state, { status: 'unloaded' })],
])('another %s in force ends what was proposed', (_, change) => {
  const stage = proposed()
  const state = smallState()
  change(state)
  stage.shown.update(state)
  expect(stage.labelsIn('cuda:0')).toContain('layers.3')
  expect(stage.button('Undo').disabled).toBe(true)
})

test('what an answer measured is shown, and nothing else is touched', () => {
  const stage = new Stage(smallState())
  const measured = (tps: number, held: number) => stage.event({
    type: 'measured', measured_tps: tps, tokens_per_sweep: 2.5, limit_share: 0.97,
    now: { cpu: { weights: held, tpu_scratch: GIB } },
  })
  const part = stage.one('.part')
  measured(12, GIB)
  for (const words of ['measured 12.0 tok/s · 97 % of the limit', '2.5 tokens per sweep']) expect(stage.text).toContain(words)
  expect(stage.tier('cpu').textContent).toContain('5.0 GiB spare · now 2.0 GiB')
  expect(stage.one('.part')).toBe(part)
  stage.key(stage.block('layers.3'), ...ALT_DOWN)
  stage.answer()
  measured(13, 2 * GIB)
  expect(stage.labelsIn('cpu')).toContain('layers.3')
  expect(stage.tier('cpu').textContent).toContain('now 3.0 GiB')
  expect(stage.button('Apply').disabled).toBe(false)
})

// --- Apply

test('progress from elsewhere is an Apply, until its end comes', () => {
  const stage = proposed()
  stage.event(PROGRESS)
  expect(isApplying(stage)).toBe(true)
  expect(stage.button('Apply').disabled).toBe(true)
  expect(stage.block('layers.0').getAttribute('aria-disabled')).toBe('true')
  stage.event({ type: 'applied', seq: FOREIGN, changed: 1, seconds: 2 })
  expect(isApplying(stage)).toBe(false)
  expect(stage.button('Apply').disabled).toBe(false)
})

test('a failure that is not ours is said only when it ended what was shown', () => {
  const stage = proposed()
  stage.event({ type: 'failed', seq: FOREIGN, message: 'Of another tab.', next_step: '' })
  expect(alert(stage)).toBe('')
  stage.event(PROGRESS)
  stage.event({ type: 'failed', seq: FOREIGN, message: 'It was cancelled.', next_step: '' })
  expect(isApplying(stage)).toBe(false)
  expect(alert(stage)).toBe('✗ It was cancelled.')
})

test('a second Apply is refused, and the first goes on to its end', () => {
  const stage = applying()
  stage.event({ type: 'failed', seq: 2, message: 'A placement is being applied.', next_step: 'Wait for it, or cancel it.' })
  expect(alert(stage)).toContain('A placement is being applied.')
  stage.event(PROGRESS)
  expect(isApplying(stage)).toBe(true)
  stage.event({ type: 'applied', seq: FOREIGN, changed: 1, seconds: 2 })
  expect(isApplying(stage)).toBe(false)
  expect(alert(stage)).toBe('')
})

test('our own Apply is not ended by what others hear', () => {
  const stage = applying()
  stage.event({ type: 'failed', seq: FOREIGN, message: 'Of another tab.', next_step: '' })
  stage.event({ type: 'applied', seq: FOREIGN, changed: 1, seconds: 2 })
  expect(isApplying(stage)).toBe(true)
  expect(alert(stage)).toBe('')
})

test('an Apply that began elsewhere ends a drag', () => {
  const stage = new Stage(smallState())
  point(stage.block('layers.2'), 'pointerdown', 10, 10)
  point(stage.tier('disk').querySelector('.bar') as Element, 'pointermove', 40, 90)
  stage.event(PROGRESS)
  expect(stage.one('.ghost').hidden).toBe(true)
})

test('progress draws the panel, and nothing else', () => {
  const stage = applying()
  stage.event(PROGRESS)
  const part = stage.one('.part')
  stage.event({ ...PROGRESS, done: 2 })
  expect(stage.one('[role="progressbar"]').getAttribute('aria-valuenow')).toBe('50')
  expect(stage.one('.part')).toBe(part)
})

test('what was applied can be undone by what was in force before', () => {
  const stage = applying()
  stage.state = otherState()
  stage.shown.update(stage.state)
  stage.event({ type: 'applied', seq: 2, changed: 1, seconds: 2.5 })
  expect(stage.labelsIn('cpu')).toContain('layers.3')
  expect(stage.one('[role="status"].status').textContent).toBe('✓ Applied: 1 block changed in 2.5 s.')
  stage.click(stage.button('Undo'))
  expect(stage.labelsIn('cuda:0')).toContain('layers.3')
  const { placement } = stage.proposals[1] ?? {}
  expect(placement).toMatchObject({ policy: '', limits: { cpu: 8 * GIB }, homes: { 'layers.3': 'cuda:0' } })
  stage.answer()
  stage.click(stage.button('Apply'))
  expect(stage.sent[stage.sent.length - 1]).toMatchObject({ type: 'apply', placement })
  // A placement that others made is no step of ours.
  stage.shown.update(smallState())
  stage.event({ type: 'applied', seq: 4, changed: 1, seconds: 1 })
  expect(stage.button('Undo').disabled).toBe(false)
  stage.shown.update(otherState())
  expect(stage.button('Undo').disabled).toBe(true)
})

// --- Questions

test('numbers of two front ends differ', () => {
  vi.spyOn(Math, 'random').mockRestore()
  const seqs: number[] = []
  const send = (command: Command) => void ('seq' in command && seqs.push(command.seq))
  for (let i = 0; i < 8; i++) new Talk('a', send).propose({ policy: 'auto' })
  expect(new Set(seqs).size).toBe(8)
  expect(seqs.every(seq => Number.isSafeInteger(seq) && seq > 0 && seq <= 2 ** 40)).toBe(true)
})

test('a question without an answer is asked again, under its number, ever more slowly', () => {
  const stage = new Stage(smallState())
  stage.key(stage.block('layers.3'), ...ALT_DOWN)
  vi.advanceTimersByTime(5000)
  expect(stage.proposals).toHaveLength(2)
  expect(stage.proposals[1]).toEqual(stage.proposals[0])
  vi.advanceTimersByTime(9000)
  expect(stage.proposals).toHaveLength(2)
  stage.answer()
  vi.advanceTimersByTime(60_000)
  expect(stage.proposals).toHaveLength(2)
  expect(stage.button('Apply').disabled).toBe(false)
})

test('a lost question does not hold up the newest', () => {
  const stage = new Stage(smallState())
  for (const label of ['layers.0', 'layers.1', 'layers.2']) stage.key(stage.block(label), ...ALT_DOWN)
  expect(stage.proposals).toHaveLength(1)
  vi.advanceTimersByTime(5000)
  expect(stage.proposals.map(({ seq }) => seq)).toEqual([1, 2])
  expect(stage.proposals[1]?.placement.homes).toMatchObject({ 'layers.0': 'cpu', 'layers.1': 'cpu', 'layers.2': 'cpu' })
  stage.answer()
  expect(stage.button('Apply').disabled).toBe(false)
})

test('a lost question that nobody wants any more is forgotten, and a view that is gone asks nothing', () => {
  const stage = new Stage(smallState())
  stage.key(stage.block('layers.3'), ...ALT_DOWN)
  stage.click(stage.button('Undo'))
  vi.advanceTimersByTime(5000)
  expect(stage.proposals).toHaveLength(1)
  stage.key(stage.block('layers.3'), ...ALT_DOWN)
  expect(stage.proposals).toHaveLength(2)
  stage.shown.cleanup()
  vi.advanceTimersByTime(60_000)
  expect(stage.proposals).toHaveLength(2)
  expect(vi.getTimerCount()).toBe(0)
})

// --- What is not known is not said

test('a refused proposal has no verdict and no forecast', () => {
  const stage = new Stage(smallState())
  stage.key(stage.block('layers.3'), ...ALT_DOWN)
  stage.event({ type: 'failed', seq: 1, message: 'It is busy.', next_step: 'Press Stop.' })
  expect(stage.all('.chips .chip').map(chip => chip.textContent)).toEqual(['proposed'])
})

test('a placement is copied when it is known what it is', () => {
  const stage = new Stage(smallState())
  expect(stage.button('Copy').disabled).toBe(false)
  stage.key(stage.block('layers.3'), ...ALT_DOWN)
  expect(stage.button('Copy').disabled).toBe(true)
  stage.answer()
  expect(stage.button('Copy').disabled).toBe(false)
  stage.key(stage.block('layers.2'), ...ALT_DOWN)
  stage.event({ type: 'failed', seq: 2, message: 'It is busy.', next_step: '' })
  expect(stage.button('Copy').disabled).toBe(true)
})
