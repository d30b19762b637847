import { afterEach, beforeEach, expect, test, vi } from 'vitest'
import { guess } from '../src/views/editor/guess'
import { History } from '../src/views/editor/history'
import { Talk } from '../src/views/editor/talk'
import type { Command } from '../src/wire'
import { lookedUpState, otherState, realState, smallState, Stage } from './map_stage'

const GIB = 1024 ** 3
const ALT_DOWN: [string, KeyboardEventInit] = ['ArrowDown', { altKey: true }]

beforeEach(() => {
  vi.spyOn(Math, 'random').mockReturnValue(0) // numbers begin with 1
})
afterEach(() => {
  vi.restoreAllMocks()
  vi.unstubAllGlobals()
})

test('clicks choose: one, a range, and one more', () => {
  const stage = new Stage(smallState())
  stage.click(stage.block('layers.0'))
  stage.click(stage.block('layers.2'), { shiftKey: true })
  expect(stage.selected()).toEqual(['layers.0', 'layers.1', 'layers.2'])
  stage.click(stage.cell('layers.6'), { ctrlKey: true })
  expect(stage.selected()).toEqual(['layers.0', 'layers.1', 'layers.2', 'layers.6'])
  stage.click(stage.cell('layers.1'), { metaKey: true })
  expect(stage.selected()).toEqual(['layers.0', 'layers.2', 'layers.6'])
  expect(stage.text).toContain('3 blocks, 3.0 GiB')
  expect(stage.block('layers.6').getAttribute('aria-selected')).toBe('true')
})

test('keys choose: Space, Shift with arrows, Ctrl+A, Escape', () => {
  const stage = new Stage(smallState())
  stage.key(stage.block('layers.4'), ' ')
  expect(stage.selected()).toEqual(['layers.4'])
  stage.key(stage.block('layers.4'), 'ArrowRight', { shiftKey: true })
  expect(stage.selected()).toEqual(['layers.4', 'layers.5'])
  expect(stage.focused).toBe(stage.block('layers.5'))
  stage.key(stage.block('layers.5'), 'End', { shiftKey: true })
  expect(stage.selected()).toEqual(['layers.4', 'layers.5', 'layers.6'])
  stage.key(stage.block('layers.6'), 'Home')
  expect(stage.focused).toBe(stage.block('layers.4'))
  expect(stage.key(stage.block('layers.4'), 'a', { ctrlKey: true }).defaultPrevented).toBe(true)
  expect(stage.selected()).toEqual(['layers.4', 'layers.5', 'layers.6'])
  // The first hides the tooltip of the focused block.
  expect(stage.key(stage.block('layers.4'), 'Escape').defaultPrevented).toBe(true)
  expect(stage.one('.tip').hidden).toBe(true)
  expect(stage.selected()).toEqual(['layers.4', 'layers.5', 'layers.6'])
  stage.key(stage.block('layers.4'), 'Escape')
  expect(stage.selected()).toEqual([])
  expect(stage.key(stage.block('layers.4'), 'Escape').defaultPrevented).toBe(false)
})

test('Alt with an arrow moves to the next tier: blocks jump at once, Python is asked', () => {
  const stage = new Stage(smallState())
  stage.block('layers.3').focus()
  stage.key(stage.block('layers.3'), ...ALT_DOWN)
  expect(stage.labelsIn('cpu')).toEqual(['layers.3', 'layers.4', 'layers.5', 'layers.6'])
  expect(stage.cell('layers.3').querySelector('.tag')?.textContent).toBe('R')
  expect(stage.tier('cpu').textContent).toContain('4.0 GiB +1.0 GiB')
  expect(stage.focused).toBe(stage.block('layers.3'))
  expect(stage.sent).toEqual([{
    type: 'propose', view: 'a1', seq: 1,
    placement: {
      policy: '', limits: { cpu: 8 * GIB },
      homes: {
        embed: 'cuda:0', 'layers.0': 'cuda:0', 'layers.1': 'cuda:0', 'layers.2': 'cuda:0', 'layers.3': 'cpu',
        'layers.4': 'cpu', 'layers.5': 'cpu', 'layers.6': 'cpu', 'layers.7': 'disk', head: 'cuda:0',
      },
    },
  }])
})

test('M asks where to; the choice moves, and the focus comes back', () => {
  const stage = new Stage(smallState())
  stage.block('layers.0').focus()
  stage.key(stage.block('layers.0'), 'm')
  expect(stage.focused?.textContent).toBe('→ RAM')
  stage.key(stage.focused as Element, 'ArrowRight')
  expect(stage.focused?.textContent).toBe('→ Disk')
  stage.click(stage.focused as Element)
  expect(stage.labelsIn('disk')).toEqual(['layers.0', 'layers.7'])
  expect(stage.focused).toBe(stage.block('layers.0'))
})

test('keys act on the focused block, alone where it is not selected', () => {
  const stage = new Stage(smallState())
  stage.click(stage.block('layers.0'))
  stage.key(stage.block('layers.4'), ...ALT_DOWN)
  expect(stage.selected()).toEqual(['layers.4'])
  expect(stage.labelsIn('disk')).toEqual(['layers.4', 'layers.7'])
  expect(stage.labelsIn('cuda:0')).toContain('layers.0')
  stage.key(stage.block('layers.1'), 'm')
  expect(stage.selected()).toEqual(['layers.1'])
  stage.key(stage.block('layers.7'), ...ALT_DOWN)
  expect(stage.selected()).toEqual(['layers.7'])
})

test('a block where blocks can not stay goes to the next tier in the direction, if there is one', () => {
  const state = smallState()
  Object.assign(state.plan.tiers[2] ?? {}, { can_hold: false })
  const stage = new Stage(state)
  stage.key(stage.block('layers.7'), ...ALT_DOWN)
  expect(stage.sent).toEqual([])
  stage.key(stage.block('layers.7'), 'ArrowUp', { altKey: true })
  expect(stage.labelsIn('cpu')).toContain('layers.7')
})

test('blocks that share tensors go together', () => {
  const stage = new Stage(smallState())
  stage.click(stage.cell('head'))
  expect(stage.text).toContain('2 blocks, 512.0 MiB (with embed, tied)')
  stage.key(stage.cell('head'), ...ALT_DOWN)
  expect(stage.proposals[0]?.placement.homes).toMatchObject({ head: 'cpu', embed: 'cpu', 'layers.0': 'cuda:0' })
  expect(stage.focused).toBe(stage.cell('head'))
})

test('a table that leaves the GPU is looked up where it goes, and streamed nowhere', () => {
  const state = lookedUpState('cpu')
  Object.assign(state.plan.blocks[0] ?? {}, { home: 'cuda:0', way: 'resident' })
  const stage = new Stage(state)
  for (const device of ['cpu', 'disk']) {
    stage.key(stage.block('embed'), ...ALT_DOWN)
    expect(stage.labelsIn(device)).toContain('embed')
    expect(stage.cell('embed').querySelector('.tag')?.textContent).toBe('L')
    expect(stage.cell('embed').getAttribute('aria-label')).toContain('rows are looked up for cuda:0')
  }
})

test('what goes beside a table that is looked up is still for the GPU', () => {
  const { plan } = lookedUpState('cpu')
  const moved = guess(plan, new Set(['layers.0']), 'cpu').blocks.find(block => block.label === 'layers.0')
  expect(moved).toMatchObject({ home: 'cpu', way: 'streamed', compute: 'cuda:0' })
})

test('without a GPU, a table is looked up on the disk, and computed in RAM', () => {
  const { plan } = realState('halved')
  Object.assign(plan.blocks[0] ?? {}, { looks_up: true, tied_to: [] })
  const onDisk = guess(plan, new Set(['embed']), 'disk')
  expect(onDisk.blocks[0]).toMatchObject({ home: 'disk', way: 'looked-up', compute: 'cpu' })
  expect(guess(onDisk, new Set(['embed']), 'cpu').blocks[0]).toMatchObject({ home: 'cpu', way: 'cpu', compute: 'cpu' })
})

test('an answer is shown beside what is in force, and Apply waits for it', () => {
  const stage = new Stage(smallState())
  expect(stage.button('Apply').disabled).toBe(true)
  stage.key(stage.block('layers.3'), ...ALT_DOWN)
  expect(stage.button('Apply').disabled).toBe(true)
  stage.answer({ decode_tps: 1, prefill_tps: 130, warnings: ['A new one.'] }, { changed: 1, moved_bytes: GIB })
  expect(stage.button('Apply').disabled).toBe(false)
  expect(stage.one('[role="status"].status').textContent).toBe('Apply would change 1 block and move 1.0 GiB.')
  const outcome = stage.one('.outcome').textContent
  expect(outcome).toContain('decode 0.50 tok/s → 1.0 tok/s ▲ +100 %')
  expect(outcome).toContain('prefill 260 tok/s → 130 tok/s ▼ −50 %')
  expect(outcome).toContain('new: ! A new one.')
  expect(outcome).toContain('no longer: 1 block of 1.0 GiB on disk.')
})

test('what does not fit says why, and can not be applied', () => {
  const stage = new Stage(smallState())
  stage.key(stage.block('layers.3'), ...ALT_DOWN)
  stage.answer({ fits: false, problems: ['RAM lacks much.'], remedies: ['Do this.', 'Or that.'] })
  expect(stage.one('.outcome').textContent).toContain('✗ RAM lacks much.→ Do this.')
  expect(stage.one('.outcome').textContent).not.toContain('Or that.')
  expect(stage.button('Apply').disabled).toBe(true)
})

test('what would change nothing can not be applied', () => {
  const stage = new Stage(smallState())
  stage.click(stage.button('Reset to auto'))
  expect(stage.sent).toEqual([{ type: 'propose', view: 'a1', seq: 1, placement: { homes: {}, policy: 'auto', limits: { cpu: 8 * GIB } } }])
  stage.answer({}, { changed: 0 })
  expect(stage.button('Apply').disabled).toBe(true)
})

test('one question is out at a time, and the newest wins', () => {
  const stage = new Stage(smallState())
  for (const label of ['layers.0', 'layers.1', 'layers.2']) stage.key(stage.block(label), ...ALT_DOWN)
  expect(stage.proposals.map(({ seq }) => seq)).toEqual([1])
  stage.answer({}, { seq: 1 })
  // The answer to the first says nothing of the other two: they stay where they are.
  expect(stage.labelsIn('cpu')).toContain('layers.2')
  expect(stage.proposals.map(({ seq }) => seq)).toEqual([1, 2])
  expect(stage.proposals[1]?.placement.homes).toMatchObject({ 'layers.0': 'cpu', 'layers.1': 'cpu', 'layers.2': 'cpu' })
  stage.answer({ decode_tps: 7 }, { seq: 1 })
  expect(stage.text).not.toContain('7.0 tok/s')
  stage.answer({ decode_tps: 9 }, { seq: 2 })
  expect(stage.text).toContain('forecast 9.0 tok/s')
})

test('undo, redo and revert', () => {
  const stage = new Stage(smallState())
  const where = () => stage.labelsIn('cpu').join(' ')
  const before = where()
  stage.key(stage.block('layers.3'), ...ALT_DOWN)
  stage.answer()
  stage.key(stage.block('layers.2'), ...ALT_DOWN)
  stage.answer()
  expect(where()).toBe('layers.2 layers.3 layers.4 layers.5 layers.6')
  stage.key(stage.block('layers.0'), 'z', { ctrlKey: true })
  expect(where()).toBe('layers.3 layers.4 layers.5 layers.6')
  expect(stage.proposals).toHaveLength(3)
  stage.answer()
  stage.key(stage.block('layers.0'), 'z', { metaKey: true })
  expect(where()).toBe(before)
  expect(stage.proposals).toHaveLength(3)
  expect(stage.button('Apply').disabled).toBe(true)
  expect(stage.button('Undo').disabled).toBe(true)
  stage.key(stage.block('layers.0'), 'Z', { ctrlKey: true, shiftKey: true })
  stage.answer()
  stage.click(stage.button('Redo'))
  expect(where()).toBe('layers.2 layers.3 layers.4 layers.5 layers.6')
  stage.answer()
  stage.click(stage.button('Revert'))
  expect(where()).toBe(before)
  expect(stage.button('Redo').disabled).toBe(true)
})

test('a policy is asked for by name', () => {
  const stage = new Stage(smallState())
  const select = stage.one('select') as HTMLSelectElement
  expect(select.value).toBe('auto')
  select.value = 'sequential'
  select.dispatchEvent(new Event('change', { bubbles: true }))
  expect(stage.proposals[0]?.placement).toEqual({ homes: {}, policy: 'sequential', limits: { cpu: 8 * GIB } })
  stage.answer()
  stage.key(stage.block('layers.3'), ...ALT_DOWN)
  expect(select.value).toBe('')
  expect(select.selectedOptions[0]?.textContent).toBe('by hand')
})

test('a budget is asked for while its slider moves, and is one step back', () => {
  const stage = new Stage(smallState())
  const slider = stage.tier('cuda:0').querySelector('input') as HTMLInputElement
  expect(slider.getAttribute('aria-label')).toBe('Budget of cuda:0')
  expect(slider.getAttribute('aria-valuetext')).toBe('7.5 GiB of 8.0 GiB')
  for (const gib of [6, 5, 4]) {
    slider.value = String(gib * 1024)
    slider.dispatchEvent(new Event('input', { bubbles: true }))
  }
  slider.dispatchEvent(new Event('change', { bubbles: true }))
  expect(stage.proposals.map(({ placement }) => placement.limits?.['cuda:0'])).toEqual([6 * GIB])
  stage.answer({ decode_tps: 6 })
  // The answer to a moment ago is shown while the newest is awaited.
  expect(stage.text).toContain('forecast 6.0 tok/s')
  expect(stage.proposals[1]?.placement).toEqual({ homes: {}, policy: 'auto', limits: { cpu: 8 * GIB, 'cuda:0': 4 * GIB } })
  stage.answer({ decode_tps: 4 })
  expect(stage.text).toContain('forecast 4.0 tok/s')
  expect(slider.getAttribute('aria-valuetext')).toBe('4.0 GiB of 8.0 GiB')
  stage.click(stage.button('Undo'))
  expect(stage.button('Undo').disabled).toBe(true)
  expect(slider.getAttribute('aria-valuetext')).toBe('7.5 GiB of 8.0 GiB')
})

function slide(stage: Stage, device: string, gib: number): void {
  const slider = stage.tier(device).querySelector('input') as HTMLInputElement
  slider.value = String(gib * 1024)
  slider.dispatchEvent(new Event('input', { bubbles: true }))
  slider.dispatchEvent(new Event('change', { bubbles: true }))
}

test('a budget keeps a placement that was made by hand', () => {
  const stage = new Stage(smallState())
  stage.key(stage.block('layers.3'), ...ALT_DOWN)
  stage.answer()
  slide(stage, 'cuda:0', 4)
  expect(stage.proposals[1]?.placement).toMatchObject({
    policy: '', limits: { cpu: 8 * GIB, 'cuda:0': 4 * GIB }, homes: { 'layers.3': 'cpu', 'layers.0': 'cuda:0' },
  })
})

test('a budget can be given up', () => {
  const stage = new Stage(smallState())
  const all = (device: string) => stage.tier(device).querySelector('button.all') as HTMLButtonElement
  expect(all('cuda:0').hidden).toBe(true)
  expect(all('cpu').hidden).toBe(false)
  expect(all('cpu').getAttribute('aria-label')).toBe('Budget of RAM: all that is free')
  stage.click(all('cpu'))
  expect(stage.proposals[0]?.placement).toEqual({ homes: {}, policy: 'auto', limits: {} })
  expect(all('cpu').hidden).toBe(true)
  expect(stage.focused).toBe(stage.tier('cpu').querySelector('input'))
  stage.answer()
  stage.click(stage.button('Undo'))
  expect(all('cpu').hidden).toBe(false)
})

test('a failed proposal says what to do, until the next', () => {
  const stage = new Stage(smallState())
  stage.key(stage.block('layers.3'), ...ALT_DOWN)
  stage.event({ type: 'failed', seq: 99, message: 'Stale.', next_step: '' })
  expect(stage.one('[role="alert"]').textContent).toBe('')
  stage.event({ type: 'failed', seq: 1, message: 'It is busy.', next_step: 'Press Stop.' })
  expect(stage.one('[role="alert"]').textContent).toBe('✗ It is busy.→ Press Stop.')
  expect(stage.button('Apply').disabled).toBe(true)
  stage.click(stage.button('Undo'))
  expect(stage.one('[role="alert"]').textContent).toBe('')
})

function applied(): Stage {
  const stage = new Stage(smallState())
  stage.key(stage.block('layers.3'), ...ALT_DOWN)
  stage.answer()
  stage.click(stage.button('Apply'))
  return stage
}

test('Apply sends what was proposed, shows how far it is, and ends', () => {
  const stage = applied()
  const [proposed, sent] = stage.sent
  expect(sent).toEqual({ ...proposed, type: 'apply', seq: 2 })
  expect(stage.button('Apply').disabled).toBe(true)
  stage.key(stage.block('layers.0'), ...ALT_DOWN)
  expect(stage.sent).toHaveLength(2)
  stage.event({
    type: 'progress', phase: 'moving', done: 3, total: 4, unit: 'blocks', detail: 'layers.3', elapsed_s: 2, left_s: 1,
  })
  const bar = stage.one('[role="progressbar"]')
  expect(bar.getAttribute('aria-valuenow')).toBe('75')
  expect(bar.getAttribute('aria-valuetext')).toBe('moving · 3 of 4 blocks · layers.3 · about 1.0 s left')
  stage.click(stage.button('Cancel'))
  expect(stage.sent[2]).toEqual({ type: 'stop', view: 'a1' })
  stage.shown.update(smallState())
  stage.event({ type: 'applied', seq: 2, changed: 1, seconds: 2.5 })
  expect(stage.one('.job').hidden).toBe(true)
  expect(stage.one('[role="status"].status').textContent).toBe('✓ Applied: 1 block changed in 2.5 s.')
  expect(stage.button('Undo').disabled).toBe(true)
})

test('an Apply that fails says so, and the proposal is still there', () => {
  const stage = applied()
  stage.event({ type: 'failed', seq: 2, message: 'Out of memory.', next_step: 'Free some.' })
  expect(stage.one('[role="alert"]').textContent).toBe('✗ Out of memory.→ Free some.')
  expect(stage.labelsIn('cpu')).toContain('layers.3')
  expect(stage.button('Apply').disabled).toBe(false)
})

test('a plan is loaded as it is, or as it was changed', () => {
  const stage = new Stage({ ...realState('experts') })
  expect(stage.button('Load').disabled).toBe(false)
  stage.click(stage.button('Load'))
  const [sent] = stage.sent
  expect(sent?.type === 'apply' && Object.keys(sent.placement.homes ?? {}).length).toBe(51)
  expect(sent?.type === 'apply' && sent.placement.limits).toEqual({ 'cuda:0': 6442450944, 'cuda:1': 5368709120 })
  expect(new Stage(realState('refused')).button('Load').disabled).toBe(true)
})

test('another state ends what was proposed, and keeps the selection', () => {
  const stage = new Stage(smallState())
  stage.click(stage.block('layers.3'))
  stage.key(stage.block('layers.3'), ...ALT_DOWN)
  stage.shown.update({ ...smallState(), plan: otherState().plan })
  expect(stage.one('.chips').textContent).not.toContain('proposed')
  expect(stage.selected()).toEqual(['layers.3'])
  expect(stage.button('Undo').disabled).toBe(true)
  stage.answer({ decode_tps: 7 })
  expect(stage.text).not.toContain('7.0 tok/s')
})

test('the placement is copied, or shown to be copied', async () => {
  const writeText = vi.fn<(text: string) => Promise<void>>(async () => undefined)
  vi.stubGlobal('navigator', Object.assign(Object.create(navigator) as Navigator, { clipboard: { writeText } }))
  const state = realState('experts')
  state.plan.exports.backend = '-ngl 12'
  const stage = new Stage(state)
  expect(stage.one('code').textContent).toBe('-ngl 12')
  stage.click(stage.button('Copy'))
  expect(stage.all('[role="menuitem"]').map(item => item.textContent)).toEqual([
    'Copy as Python', 'Copy as %llm command', 'Copy as JSON', 'Copy as llama.cpp options', 'Backend flags',
  ])
  stage.key(stage.focused as Element, 'ArrowDown')
  stage.click(stage.focused as Element)
  await vi.waitFor(() => expect(stage.button('Copied')).toBeTruthy())
  expect(writeText).toHaveBeenCalledWith(state.plan.exports.command)

  writeText.mockRejectedValue(new Error('not allowed'))
  stage.click(stage.button('Copied'))
  stage.click(stage.button('Copy as JSON'))
  await vi.waitFor(() => expect(stage.all('textarea')).toHaveLength(1))
  const area = stage.one('textarea') as HTMLTextAreaElement
  expect(area.value).toBe(state.plan.exports.json)
  expect(stage.focused).toBe(area)
  expect(area.readOnly).toBe(true)
})

test('steps go back and forth; a gesture is one of them', () => {
  const history = new History(0)
  history.push(1)
  history.push(2, 'slide')
  history.push(3, 'slide')
  history.endGesture()
  history.push(4, 'slide')
  expect([history.undo(), history.current, history.undo(), history.current]).toEqual([true, 3, true, 1])
  expect([history.redo(), history.current]).toEqual([true, 3])
  history.push(9)
  expect([history.canRedo, history.undo(), history.undo(), history.undo(), history.undo(), history.current]).toEqual([false, true, true, true, false, 0])
})

test('a question that is not of interest any more is not waited for', () => {
  const sent: Command[] = []
  const talk = new Talk('a', command => void sent.push(command))
  talk.propose({ policy: 'auto' })
  talk.propose({ policy: 'cpu' })
  talk.forget()
  expect(talk.isWaiting).toBe(false)
  expect(talk.take(1)).toBe('past')
  expect(talk.take(1)).toBe('stale')
  expect(sent).toHaveLength(1)
})
