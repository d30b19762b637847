/** The path of one token in words: its steps in order, how long each takes, and which sets the pace. */

import { type Child, h } from '../../dom'
import type { Translate } from '../../i18n'
import { formatBytes, formatRate } from '../../units'
import type { MachineState } from '../../wire'
import { memoryWords, placeWords, unifiedGpus } from './facts'
import { timeWords } from './labels'
import { isOwn, type Path, type Step } from './path'

/** Children of the panel. */
export function stepsPanel(state: MachineState, path: Path, t: Translate): HTMLElement[] {
  const longest = Math.max(...path.steps.map(step => step.seconds))
  return [
    h('h3', {}, t('machinePathOf', { model: state.model })),
    h('ol', {}, ...path.steps.map(step => item(step, longest, path, state, t))),
    h('dl', { class: 'mv-sums num' }, ...sums(state, path, t)),
  ]
}

/** `disk → RAM`, or `cuda:0 reads its VRAM`. */
export function wayWords(step: Step, state: MachineState, t: Translate): string {
  const [source, target] = [placeWords(step.source, state, t), placeWords(step.target, state, t)]
  if (!isOwn(step)) return t('machineHop', { source, target })
  const device = state.devices.find(one => one.id === step.source)
  if (!device) return target
  if (device.kind === 'cpu' ? unifiedGpus(state).length : device.unified) return t('machineReadsShared', { device: device.id })
  return t('machineReadsOwn', { device: device.kind === 'cpu' ? t('machineCpu') : device.id, memory: memoryWords(device, state, t) })
}

function item(step: Step, longest: number, path: Path, state: MachineState, t: Translate): HTMLElement {
  const isLimiting = path.limiting.includes(step)
  const words = t('machineStep', {
    way: wayWords(step, state, t), size: formatBytes(step.bytes), time: timeWords(step.seconds, t),
  })
  const share = longest ? (100 * step.seconds) / longest : 0
  return h('li', { class: isLimiting ? 'limiting' : '' },
    h('span', { class: 'mv-number', 'aria-hidden': 'true' }, String(step.number)),
    h('span', { class: 'mv-words num' }, isLimiting && path.limiting.length === 1 ? `${words} (${t('machineSetsPace')})` : words),
    h('div', { class: 'mv-time', 'aria-hidden': 'true' }, h('div', { '--share': `${share.toFixed(1)}%` })))
}

/** The step that sets the pace, or that all reads of memory do. */
export function bottleneckWords(path: Path, state: MachineState, t: Translate): string {
  const [first] = path.limiting
  const way = first && path.limiting.length === 1 ? wayWords(first, state, t) : t('machineReadsInTurn')
  return t('machineTakes', { way, time: timeWords(path.seconds, t) })
}

function sums(state: MachineState, path: Path, t: Translate): Child[] {
  const row = (name: string, value: string) => [h('dt', {}, name), h('dd', {}, value)]
  const [moved, read] = [formatBytes(path.moved), formatBytes(path.read)]
  const total = path.moved ? t('machineTotalBytes', { moved, read }) : t('machineTotalRead', { read })
  return [
    ...row(t('machineTotal'), total),
    ...(path.limiting.length ? row(t('machineBottleneck'), bottleneckWords(path, state, t)) : []),
    ...(path.seconds ? row(t('machineAtBest'), t('machineAtBestRate', { rate: formatRate(1 / path.seconds) })) : []),
  ]
}
