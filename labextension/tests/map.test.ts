import { expect, test, vi } from 'vitest'
import { LANGUAGES } from '../src/i18n'
import { MAP_CSS } from '../src/views/map/css'
import { guess } from '../src/views/editor/guess'
import { percents, scaleOf, shownTiers, signOf, stepOf, stripColumns, weightShares } from '../src/views/map/facts'
import { mapWords } from '../src/words/map'
import type { MapState } from '../src/wire'
import { lookedUpState, realState, smallState, Stage } from './map_stage'

const hover = (element: Element) => element.dispatchEvent(new Event('pointerover', { bubbles: true }))
/** As the page has it: without zeros at the end. */
const widthOf = (element: Element | null | undefined) => (element as HTMLElement).style.width

test('bars of all tiers have one scale', () => {
  const stage = new Stage(smallState())
  // RAM is the largest: 16 GiB. GPU 8 of 16; disk is cut off after 1 GiB.
  expect(widthOf(stage.tier('cpu').querySelector('.bar'))).toBe('100%')
  expect(widthOf(stage.tier('cuda:0').querySelector('.bar'))).toBe('50%')
  expect(widthOf(stage.tier('disk').querySelector('.bar'))).toBe('6.25%')
  expect(stage.tier('disk').querySelector('.bar')?.classList).toContain('cut')
  expect(stage.tier('disk').querySelector('.ends')?.textContent).toBe('…')
})

test('blocks and all else in a bar have their share of it', () => {
  const stage = new Stage(smallState())
  const gpu = stage.tier('cuda:0')
  // 4.5 GiB of blocks in a bar of 8: 56.25 %; a layer of 1 GiB is 1/4.5 of them, embed half of that.
  expect(widthOf(gpu.querySelector('.blocks'))).toBe('56.25%')
  expect(widthOf(stage.block('layers.0'))).toBe('22.222%')
  expect(widthOf(stage.block('embed'))).toBe('11.111%')
  // The other 3.5 GiB: 0.5 slots, 1 cache, 1.5 free, 0.5 others.
  expect(widthOf(gpu.querySelector('.parts'))).toBe('43.75%')
  expect([...gpu.querySelectorAll('.part')].map(part => [part.classList[1], widthOf(part)])).toEqual([
    ['fill-slots', '14.286%'], ['fill-kv_cache', '28.571%'], ['fill-free', '42.857%'], ['fill-other', '14.286%'],
  ])
})

test('a budget below what is free is drawn, and what is beyond it', () => {
  const stage = new Stage(smallState())
  // RAM: 16 − 3 planned = 13 of room; 5 are spare, 8 beyond the limit.
  expect(widthOf(stage.tier('cpu').querySelector('.is-spare'))).toBe('38.462%')
  expect(widthOf(stage.tier('cpu').querySelector('.is-beyond'))).toBe('61.538%')
})

test('a plan that is too large runs past the end of its device', () => {
  const state = smallState()
  Object.assign(state.plan.tiers[0] ?? {}, { planned: 20 * 1024 ** 3, spare: -12.5 * 1024 ** 3 })
  const stage = new Stage(state)
  // The bar is 20.5 GiB now, the largest; the device ends at 8: 39.024 %.
  expect(stage.tier('cuda:0').querySelector<HTMLElement>('.end')?.style.left).toBe('39.024%')
  expect(stage.tier('cuda:0').textContent).toContain('cuda:0 ends here: 8.0 GiB')
  expect(stage.tier('cuda:0').textContent).toContain('lacks 12.5 GiB')
})

test('a budget that is too small is marked in a bar that is cut off', () => {
  const stage = new Stage(realState('refused'))
  // 8 GiB of 61 GiB.
  expect(stage.tier('disk').querySelector<HTMLElement>('.end')?.style.left).toBe('13.11%')
  expect(stage.text).toContain('✗ does not fit')
  expect(stage.text).toContain('With --max-memory disk=58216MiB it fits.')
})

test('the head says what the model is, whether it fits, and how fast it is', () => {
  const { text } = new Stage(realState('streamed'))
  for (const words of [
    'Qwen3-32B', 'bfloat16 · 61.0 GiB · 64 layers · context 8,192', '✓ fits, 193.7 MiB to spare on cuda:0',
    '28 % GPU · 2 % looked up · 63 % RAM streamed · 7 % disk', 'forecast 0.53 tok/s · prefill 271 tok/s',
    'measured 3.3 tok/s · 97 % of the limit', 'bound by bus to cuda:0, 25.0 GB/s', '2.6 tokens per sweep',
  ]) expect(text).toContain(words)
})

test('what moves is said above its tier, in a lane as wide as its bytes', () => {
  const stage = new Stage(smallState())
  expect(stage.tier('cpu').textContent).toContain('↑ 3.0 GiB to cuda:0 for every token · link 25.0 GB/s')
  expect(widthOf(stage.tier('cpu').querySelector('.lane'))).toBe('18.75%')
  expect(stage.tier('cuda:0').querySelector<HTMLElement>('.link')?.hidden).toBe(true)
})

test('signs of the strip say where a block is and who computes it', () => {
  const sign = (name: Parameters<typeof realState>[0], label: string) => {
    const { plan } = realState(name)
    const block = plan.blocks.find(one => one.label === label)
    return block && signOf(plan, block)
  }
  expect(sign('streamed', 'embed')).toBe('L')
  expect(sign('streamed', 'head')).toBe('0')
  expect(sign('streamed', 'layers.0')).toBe('R')
  expect(sign('streamed', 'layers.6')).toBe('D')
  expect(sign('experts', 'layers.0')).toBe('C')
  expect(sign('halved', 'embed')).toBe('R')
  expect(new Set(realState('refused').plan.blocks.map(block => signOf(realState('refused').plan, block)))).toContain('K')
  expect(new Stage(smallState()).all('.strip .tag').map(tag => tag.textContent).join('')).toBe('00000RRRD0')
})

test('of a split layer the experts are in RAM, and the rest on the GPU', () => {
  const { plan } = realState('split')
  const stage = new Stage(realState('split'))
  const block = plan.blocks.find(one => one.way === 'split')
  const [gpu, ram] = plan.tiers
  if (!block || !gpu || !ram) throw new Error('nothing is split')
  expect(signOf(plan, block)).toBe('S')
  expect(stage.cell(block.label).classList).toContain('fill-ram')
  expect(stage.cell(block.label).getAttribute('aria-label')).toContain('experts computed by the CPU, the rest by cuda:0')
  expect(stage.cell(block.label).getAttribute('aria-label')).toContain('its experts stream to cuda:0 for')
  expect(stage.one('.legend').textContent).toContain('layers without their experts')
  expect(stage.tier('cuda:0').querySelector('.fill-split')).not.toBeNull()
  const split = plan.blocks.filter(one => one.way === 'split')
  expect(split.reduce((sum, one) => sum + one.rest_bytes, 0)).toBe(gpu.split)
  const inRam = plan.blocks.filter(one => one.home === 'cpu').reduce((sum, one) => sum + one.bytes - one.rest_bytes, 0)
  expect(inRam).toBe(ram.weights)
  expect([...weightShares(plan).values()].reduce((sum, share) => sum + share, 0)).toBe(100)
})

test('a split layer that moves takes its rest along', () => {
  const { plan } = realState('split')
  const block = plan.blocks.find(one => one.way === 'split')
  if (!block) throw new Error('nothing is split')
  const planned = (state: typeof plan, device: string) => state.tiers.find(tier => tier.device === device)?.planned ?? 0
  const onDisk = guess(plan, new Set([block.label]), 'disk')
  expect(planned(onDisk, 'cuda:0')).toBe(planned(plan, 'cuda:0') - block.rest_bytes)
  expect(planned(onDisk, 'cpu')).toBe(planned(plan, 'cpu') - block.bytes + block.rest_bytes)
  expect(planned(onDisk, 'disk')).toBe(planned(plan, 'disk') + block.bytes)
  expect(onDisk.blocks.find(one => one.label === block.label)?.rest_bytes).toBe(0)
})

test('what no text runs through is shown, and said to be unused', () => {
  const state = smallState()
  const shares = weightShares(state.plan)
  const layer = state.plan.blocks[1]
  if (!layer) throw new Error('no layer')
  state.plan.blocks.push({ ...layer, label: 'vision_tower', kind: 'tower', home: 'cpu', way: 'idle', cache_bytes: 0 })
  const stage = new Stage(state)
  expect(stage.all('.strip .tag').map(tag => tag.textContent).join('')).toBe('00000RRRD0–')
  expect(stage.block('vision_tower').classList).toContain('fill-idle')
  expect(stage.one('.legend').textContent).toContain('not used for text')
  hover(stage.block('vision_tower'))
  expect(stage.one('.tip').textContent).toContain('in RAM, not used for text')
  expect(weightShares(state.plan)).toEqual(shares)
})

test('a table in RAM or on disk is said to be looked up there, not streamed or read', () => {
  const inRam = new Stage(lookedUpState('cpu'))
  expect(inRam.all('.strip .tag').map(tag => tag.textContent).join('')).toBe('L0000RRRD0')
  expect(inRam.block('embed').classList).toContain('fill-looked-up')
  hover(inRam.block('embed'))
  expect(inRam.one('.tip').textContent).toContain('in RAM, rows are looked up for cuda:0')
  expect(inRam.one('.legend').textContent).toContain('rows are looked up where they are')
  expect(inRam.one('.legend').textContent).toContain('L = RAM, looked up')
  // Of 9 GiB: 4.5 on the GPU, 0.5 of the table, 3 and 1 of layers.
  expect(inRam.text).toContain('50 % GPU · 6 % looked up · 33 % RAM streamed · 11 % disk')
  const onDisk = new Stage(lookedUpState('disk'), 'ja')
  hover(onDisk.block('embed'))
  expect(onDisk.one('.tip').textContent).toContain('ディスク上、cuda:0 のために行のみ参照')
  expect(onDisk.one('.legend').textContent).toContain('L = ディスク、行のみ参照')
  expect(new Stage(lookedUpState('disk', 'cpu')).one('.legend').textContent).toContain('L = RAM and disk, looked up')
})

test('a disk whose blocks are all looked up is not read', () => {
  const state = lookedUpState('disk')
  const says = () => new Stage(state).tier('disk').textContent
  expect(says()).toContain('read from its files')
  const layer = state.plan.blocks.find(block => block.label === 'layers.7')
  Object.assign(layer ?? {}, { way: 'idle' })
  for (const mapped of [false, true]) {
    state.plan.mapped = mapped
    expect(says()).toContain('looked up in its files')
  }
})

test('the strip has rows of equal length', () => {
  expect([stripColumns(66), stripColumns(67), stripColumns(126), stripColumns(0)]).toEqual([66, 34, 63, 1])
})

test('shares add up, and what is there shows', () => {
  expect([...percents(new Map([['a', 1], ['b', 1], ['c', 1]])).values()]).toEqual([34, 33, 33])
  expect([...percents(new Map([['a', 9999], ['b', 1]])).values()]).toEqual([99, 1])
  expect(percents(new Map()).size).toBe(0)
})

test('the scale has round marks', () => {
  expect(stepOf(64 * 1024 ** 3)).toBe(8 * 1024 ** 3)
  expect(scaleOf([])).toBe(1)
})

test('tied blocks and experts are marked, and said', () => {
  const stage = new Stage(smallState())
  expect(stage.cell('head').getAttribute('data-mark')).toBe('∞')
  expect(stage.cell('head').getAttribute('aria-label')).toContain('shares tensors with embed')
  expect(stage.text).toContain('∞ shares tensors, moves together')
  const experts = new Stage(realState('experts'))
  expect(experts.cell('layers.0').getAttribute('data-mark')).toBe('∷')
  expect(experts.cell('layers.0').getAttribute('aria-label')).toContain('8 of 128 experts a token')
})

test('a tooltip says all of a block, on hover and on focus', () => {
  const stage = new Stage(smallState())
  hover(stage.block('layers.4'))
  const lines = [...stage.one('.tip').children].map(line => line.textContent)
  expect(lines).toEqual([
    'layers.4', '1.0 GiB · bfloat16', 'in RAM, streams to cuda:0', 'KV cache 64.0 MiB on cuda:0',
  ])
  stage.key(stage.block('layers.4'), 'Escape')
  expect(stage.one('.tip').hidden).toBe(true)
  hover(stage.tier('cuda:0').querySelector('.is-kv_cache') as Element)
  expect(stage.one('.tip').textContent).toBe('KV cache: 1.0 GiB on cuda:0')
  stage.cell('layers.7').focus()
  expect(stage.one('.tip').textContent).toContain('on disk, read for cuda:0 every time')
})

test('times of a sweep are drawn, added up, and in the tooltip', () => {
  const stage = new Stage(smallState())
  expect(stage.one('.totals').hidden).toBe(true)
  const times = stage.state.plan.blocks.map((_, i) => (i === 5 ? [0.01, 0.03, 0.06] : [0, 0, 0.05]))
  stage.event({ type: 'sweep', times })
  const heights = (i: number) => [...(stage.all('.meter')[i]?.children ?? [])].map(bar => (bar as HTMLElement).style.height)
  // Compute, copy, wait from below; the slowest block (0.1 s) is as high as there is room.
  expect(heights(5)).toEqual(['60%', '30%', '10%'])
  expect(heights(0)).toEqual(['50%', '0%', '0%'])
  // Nine blocks of 50 ms and one of 60 ms.
  expect(stage.one('.totals').textContent).toContain('wait 10 ms · copy 30 ms · compute 510 ms')
  hover(stage.cell('layers.4'))
  expect(stage.one('.tip').textContent).toContain('last sweep: wait 10 ms, copy 30 ms, compute 60 ms')
  expect(stage.one('.map').classList).toContain('is-flowing')
})

test('the flow rests when nothing comes', () => {
  vi.useFakeTimers()
  const stage = new Stage(smallState())
  stage.event({ type: 'sweep', times: [[0, 0, 0.5]] })
  vi.advanceTimersByTime(2900)
  expect(stage.one('.map').classList).toContain('is-flowing')
  vi.advanceTimersByTime(200)
  expect(stage.one('.map').classList).not.toContain('is-flowing')
  vi.useRealTimers()
})

test('what a loaded model holds now is beside what was planned', () => {
  expect(new Stage(realState('halved')).tier('cpu').textContent).toContain('2.8 MiB spare · now 153.0 MiB')
})

test('what memory is used for now is said in words', () => {
  const state = smallState()
  Object.assign(state.plan.tiers[1] ?? {}, { now: { weights: 1024 ** 3, kv_cache: 1024 ** 2, scratch: 1024 ** 2 } })
  const lines = (language: 'en' | 'ja') => {
    const stage = new Stage(state, language)
    hover(stage.tier('cpu').querySelector('.name') as Element)
    return stage.one('.tip').textContent
  }
  expect(lines('en')).toContain('now weights: 1.0 GiB in RAMnow KV cache: 1.0 MiB in RAMnow scratch: 1.0 MiB in RAM')
  expect(lines('ja')).toContain('現在の 重み: 1.0 GiB(RAM 上)現在の KV キャッシュ: 1.0 MiB(RAM 上)')
})

test('what bounds the speed is said in the language of the page', () => {
  expect(new Stage(smallState(), 'ja').text).toContain('律速: cuda:0 へのバス、25.0 GB/s')
})

test('Japanese has one style, and one word for each thing', () => {
  for (const { ja } of Object.values(mapWords)) expect(ja).not.toMatch(/[：（）]|測定|進み|周/)
})

test('counts and shares are written alike in every language', () => {
  const state = smallState()
  Object.assign(state.plan, { context_length: 131072 })
  for (const language of LANGUAGES) {
    const stage = new Stage(state, language)
    stage.event({ type: 'progress', phase: 'moving', done: 1, total: 2, unit: 'blocks', detail: '', elapsed_s: 1, left_s: 0 })
    stage.event({ type: 'applied', seq: 5, changed: 1234, seconds: 1 })
    for (const words of ['131,072', '53 %', '1,234']) expect(stage.text).toContain(words)
  }
})

test('a finger scrolls where nothing can be dragged', () => {
  expect(MAP_CSS).toContain('.map.can-edit .block { cursor: grab; touch-action: none; }')
  expect(MAP_CSS.match(/touch-action/g)).toHaveLength(1)
})

test('a model that goes leaves no times and no flow behind', () => {
  const stage = new Stage(smallState())
  stage.event({ type: 'sweep', times: [[0, 0, 1]] })
  stage.shown.update({ ...smallState(), status: 'unloaded' })
  expect(stage.one('.totals').hidden).toBe(true)
  expect(stage.all('.legend .time-wait')).toEqual([])
  expect(stage.one('.map').classList).not.toContain('is-flowing')
})

test('a tier is a list that Tab reaches once', () => {
  const stage = new Stage(smallState())
  const list = stage.tier('cpu').querySelector('[role="listbox"]')
  expect(list?.getAttribute('aria-label')).toBe('RAM: blocks')
  expect(list?.getAttribute('aria-multiselectable')).toBe('true')
  expect([...(list?.children ?? [])].map(option => option.getAttribute('tabindex'))).toEqual(['0', '-1', '-1'])
})

test('empty tiers are there while blocks may be moved to them', () => {
  const { plan } = realState('experts')
  expect(shownTiers(plan, true).map(tier => tier.device)).toEqual(['cuda:0', 'cuda:1', 'cpu', 'disk'])
  expect(shownTiers(plan, false).map(tier => tier.device)).toEqual(['cuda:0', 'cuda:1', 'cpu'])
})

test('names are text', () => {
  const state = smallState()
  const evil = '<img src=x onerror=alert(1)>'
  const [first] = state.plan.blocks
  if (first) Object.assign(first, { label: evil, dtype: evil, tied_to: [evil] })
  Object.assign(state.plan, { name: evil, warnings: [evil], problems: [evil], bound_by: evil })
  Object.assign(state.plan.tiers[0] ?? {}, { name: evil })
  const stage = new Stage(state)
  hover(stage.all('.strip [role="option"]')[0] as Element)
  stage.event({ type: 'failed', seq: 1, message: evil, next_step: evil })
  expect(stage.all('img, script')).toEqual([])
  expect(stage.one('.model').textContent).toBe(evil)
  expect(stage.one('.tip b').textContent).toBe(evil)
})

test('nothing to draw, and what nobody knows yet, is no error', () => {
  const state = smallState()
  Object.assign(state.plan, { blocks: [], tiers: [], moves: [], decode_tps: 0 })
  expect(new Stage(state).text).toContain('forecast unknown')
  const future = smallState()
  Object.assign(future.plan.blocks[1] ?? {}, { home: 'tpu:0', way: 'teleported', kind: 'dream' })
  Object.assign(future.plan.tiers[0] ?? {}, { kind: 'tpu' })
  const stage = new Stage(future)
  expect(stage.cell('layers.0').textContent).toContain('?')
  stage.event({ type: 'sweep', times: [] })
  stage.event({ type: 'something new' })
})

test('126 blocks are drawn again in a frame', () => {
  const state = realState('streamed')
  const layer = state.plan.blocks[1]
  if (!layer) throw new Error('no layer')
  state.plan.blocks = Array.from({ length: 126 }, (_, i) => ({ ...layer, label: `layers.${i}` }))
  const stage = new Stage(state)
  expect(stage.all('.strip [role="option"]')).toHaveLength(126)
  const kept = stage.cell('layers.100')
  stage.shown.update(structuredClone(state))
  expect(stage.cell('layers.100')).toBe(kept)
})

test.each(LANGUAGES)('every state is shown in %s', language => {
  for (const name of ['streamed', 'halved', 'refused', 'experts', 'split'] as const) {
    const stage = new Stage(realState(name), language)
    expect(stage.text).not.toMatch(/undefined|NaN|\{\w+\}/)
    stage.shown.cleanup()
    expect(stage.root.childElementCount).toBe(0)
  }
})

test('a lost kernel is said, and ends everything', () => {
  const stage = new Stage(smallState())
  stage.event({ type: 'sweep', times: [[0, 0, 1]] })
  stage.shown.lost('Model unloaded.')
  expect(stage.one('.lost').textContent).toBe('Model unloaded.')
  expect(stage.one('.map').className).toContain('is-lost')
  expect(stage.one('.map').className).not.toContain('is-flowing')
  expect(stage.one('.totals').hidden).toBe(true)
  for (const control of stage.all('.panel > .controls button, select, input')) expect(control.matches(':disabled')).toBe(true)
  stage.key(stage.block('layers.0'), 'ArrowDown', { altKey: true })
  stage.key(stage.block('layers.0'), ' ')
  stage.event({ type: 'sweep', times: [[0, 0, 1]] })
  expect(stage.sent).toEqual([])
  expect(stage.selected()).toEqual([])
  expect(stage.one('.totals').hidden).toBe(true)
})

test('an unloaded model is shown, and can not be changed until it is there again', () => {
  const stage = new Stage(smallState())
  const unloaded: MapState = { ...stage.state, status: 'unloaded' }
  stage.shown.update(unloaded)
  expect(stage.one('.lost').textContent).toContain('not loaded any more')
  stage.click(stage.block('layers.0'))
  expect(stage.selected()).toEqual([])
  stage.shown.update(smallState())
  expect(stage.one('.lost').hidden).toBe(true)
  stage.click(stage.block('layers.0'))
  expect(stage.selected()).toEqual(['layers.0'])
})
